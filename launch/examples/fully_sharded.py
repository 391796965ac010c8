"""Fully sharded training (FSDP, ZeRO): each rank holds a shard of every parameter, and reads other rows.

    mpirun -n 2 python launch/examples/fully_sharded.py
    python launch/examples/fully_sharded.py                 # alone: the same losses and norms

Rank 0 writes runs/fully_sharded.jsonl (``distclip report runs/fully_sharded.jsonl`` draws it). Each rank saves its
shards of the model.
"""

import argparse
from pydoc_data.topics import topics  # text that Python ships
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import distclip as dc

TEXT = mx.array(list("\n".join(topics.values()).encode()))
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
    world = dc.init()  # gives MPI the reduce-scatter that fully_shard needs
    mx.random.seed(0)  # every rank makes the whole model, then keeps its shards
    model: Any = ByteLM()
    model.embedding, model.positions = nn.fully_shard(model.embedding), nn.fully_shard(model.positions)
    model.blocks.layers = [nn.fully_shard(block) for block in model.blocks.layers]
    model.blocks.ln, model.head = nn.fully_shard(model.blocks.ln), nn.fully_shard(model.head)
    # fully_shard has averaged the gradients: no average=
    optimizer = dc.ClippedOptimizer(optim.AdamW(3e-3), dc.Clipper(max_norm=1.0, layout=dc.layout_of(model)))
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    recorder = dc.Recorder("runs/fully_sharded.jsonl", live=True, steps=steps)
    with recorder as record, dc.Watchdog(timeout=300) as watchdog:
        for step in range(steps):
            loss, grads = loss_and_grad(model, batch(step)[world.rank :: world.size])
            optimizer.update(model, grads)
            with mx.stream(world.stream):  # where no GPU waits for other ranks
                loss = mx.distributed.all_sum(loss) / world.size
            mx.eval(model.parameters(), optimizer.state, loss)
            record(optimizer.report, loss=loss)
            watchdog(step=step + 1)
            world.barrier()  # the model communicates, and a GPU must not wait in it for a rank that is late
    model.save_weights(f"runs/fully_sharded-{world.rank}-of-{world.size}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
