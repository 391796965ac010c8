"""Data parallel training with gradient accumulation: each rank reads other rows, and the gradients are averaged.

    mpirun -n 2 python launch/examples/data_parallel.py
    python launch/examples/data_parallel.py                 # alone: the same losses and norms

Rank 0 writes runs/data_parallel.jsonl (``distclip report runs/data_parallel.jsonl`` draws it) and saves the model in
runs/data_parallel.safetensors.
"""

import argparse
from pydoc_data.topics import topics  # text that Python ships

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

import distclip as dc

TEXT = mx.array(list("\n".join(topics.values()).encode()))
BATCHES = 4  # of an update
ROWS, CONTEXT = 12, 32  # of a batch, over all ranks; bytes in a row


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
    world = dc.init()  # before anything else uses mx.distributed
    mx.random.seed(0)  # the same parameters on every rank
    model = ByteLM()
    optimizer = dc.ClippedOptimizer(optim.AdamW(3e-3), dc.Clipper(max_norm=1.0, average=True))
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    recorder = dc.Recorder("runs/data_parallel.jsonl", live=True, steps=steps)
    with recorder as record, dc.Watchdog(timeout=300) as watchdog:
        for step in range(steps):
            rows = [batch(BATCHES * step + i)[world.rank :: world.size] for i in range(BATCHES)]
            loss, grads = loss_and_grad(model, rows[0])
            for more in rows[1:]:
                mx.eval(loss, grads)  # only one batch has activations in memory
                loss, grads = tree_map(mx.add, (loss, grads), loss_and_grad(model, more))
            loss, grads = tree_map(lambda total: total / BATCHES, (loss, grads))
            optimizer.update(model, grads)  # sends gradients while the backward pass of the last batch makes them
            with mx.stream(world.stream):  # where no GPU waits for other ranks
                loss = mx.distributed.all_sum(loss) / world.size
            mx.eval(model.parameters(), optimizer.state, loss)
            record(optimizer.report, loss=loss)
            watchdog(step=step + 1)
    if world.rank == 0:
        model.save_weights("runs/data_parallel.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
