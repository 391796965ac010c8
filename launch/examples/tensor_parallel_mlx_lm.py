"""Tensor parallel training of a model of mlx-lm: ranks share its heads and layers, and all read the same rows.

    mpirun -n 2 python launch/examples/tensor_parallel_mlx_lm.py
    mpirun -n 2 python launch/examples/tensor_parallel_mlx_lm.py --model Qwen/Qwen3-0.6B
    python launch/examples/tensor_parallel_mlx_lm.py          # alone: the same losses and norms

Without ``--model`` it is a tiny Qwen3 that reads bytes. docs/how-to/tensor-parallel.md says which models are right.
Rank 0 writes runs/tensor_parallel.jsonl (``distclip report runs/tensor_parallel.jsonl`` draws it). Each rank saves its
shards.
"""

import argparse
from pydoc_data.topics import topics  # text that Python ships
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx_lm.models import qwen3

import distclip as dc
from distclip.integrations.mlx_lm import shard

ROWS, CONTEXT = 8, 32  # of a batch: rows, and tokens in a row


def load(name: str | None) -> tuple[Any, mx.array]:
    """A model, and the text as its tokens. A name is one for ``mlx_lm.load``, or a folder."""
    text = "\n".join(topics.values())
    if name:
        model, tokenizer = mlx_lm.load(name)[:2]
        return model, mx.array(tokenizer.encode(text))
    shape: Any = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 12}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    rest: Any = {"rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 1e4}
    return qwen3.Model(qwen3.ModelArgs("qwen3", **shape, **rest)), mx.array(list(text.encode()))


def loss_fn(model: nn.Module, rows: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(rows[:, :-1]).astype(mx.float32), rows[:, 1:], reduction="mean")


def main(steps: int, name: str | None) -> None:
    world = dc.init()  # before anything else uses mx.distributed
    mx.random.seed(0)  # the same parameters on every rank
    model, tokens = load(name)
    mesh = dc.Mesh(tp=world.size)
    layout = shard(model, mesh)  # before the optimizer is made; raises if mlx-lm's gradient would be wrong
    rate = 1e-5 if name else 3e-3  # a trained model takes small steps
    optimizer = dc.ClippedOptimizer(optim.AdamW(rate), dc.Clipper(max_norm=1.0, layout=layout))
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    recorder = dc.Recorder("runs/tensor_parallel.jsonl", live=True, steps=steps)
    with recorder as record, dc.Watchdog(timeout=300) as watchdog:
        for step in range(steps):
            starts = mx.random.randint(0, len(tokens) - CONTEXT, (ROWS, 1), key=mx.random.key(step))
            loss, grads = loss_and_grad(model, tokens[starts + mx.arange(CONTEXT + 1)])
            optimizer.update(model, grads)
            mx.eval(model.parameters(), optimizer.state, loss)
            record(optimizer.report, loss=loss)
            watchdog(step=step + 1)
            world.barrier()  # the model communicates, and a GPU must not wait in it for a rank that is late
    model.save_weights(f"runs/tensor_parallel-{world.rank}-of-{world.size}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", help="a name for mlx_lm.load, or a folder (default: a tiny model made here)")
    args = parser.parse_args()
    main(args.steps, args.model)
