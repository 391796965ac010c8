"""One process: a compiled step with clipping, where a step that is not finite changes nothing.

    python launch/examples/one_process.py

It writes runs/one_process.jsonl (``distclip report runs/one_process.jsonl`` draws it) and saves the model and the
optimizer's state in runs/one_process.safetensors.
"""

import argparse
from functools import partial
from pydoc_data.topics import topics  # text that Python ships
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import distclip as dc

TEXT = mx.array(list("\n".join(topics.values()).encode()))
ROWS, CONTEXT = 12, 32  # of a batch: rows, and bytes in a row


class ByteLM(nn.Module):
    def __init__(self, dims: int = 48, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, dims), nn.Embedding(CONTEXT, dims)
        self.blocks = nn.TransformerEncoder(layers, dims, heads, norm_first=True)
        self.head = nn.Linear(dims, 256)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        x = self.embedding(tokens) + self.positions(mx.arange(length))
        return self.head(self.blocks(x, nn.MultiHeadAttention.create_additive_causal_mask(length)))


def loss_fn(model: nn.Module, rows: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")


def batch(step: int) -> mx.array:
    """Rows of the text: bytes, shape (ROWS, CONTEXT + 1)."""
    starts = mx.random.randint(0, len(TEXT) - CONTEXT, (ROWS, 1), key=mx.random.key(step))
    return TEXT[starts + mx.arange(CONTEXT + 1)]


def main(steps: int) -> None:
    mx.random.seed(0)
    model = ByteLM()
    optimizer = dc.ClippedOptimizer(optim.AdamW(3e-3), dc.Clipper(max_norm=1.0))
    optimizer.init(model.trainable_parameters())  # so that its state is there when the step is compiled
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def train_step(rows: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        loss, grads = loss_and_grad(model, rows)
        optimizer.update(model, grads)
        return loss, optimizer.report.arrays

    with dc.Recorder("runs/one_process.jsonl", live=True, steps=steps) as record:
        for step in range(steps):
            loss, arrays = train_step(batch(step))
            mx.eval(state, loss)
            optimizer.clipper.settle()  # raises if too many steps in a row were skipped
            record(optimizer.clipper.report(arrays), loss=loss)
    saved: Any = tree_flatten({"model": model.parameters(), "optimizer": optimizer.state})
    mx.save_safetensors("runs/one_process.safetensors", dict(saved))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
