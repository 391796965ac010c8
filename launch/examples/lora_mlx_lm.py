"""LoRA with mlx-lm's trainer, clipped, on two ranks: each takes its half of every batch.

    mpirun -n 2 python launch/examples/lora_mlx_lm.py
    mpirun -n 2 python launch/examples/lora_mlx_lm.py --model mlx-community/Llama-3.2-1B-Instruct-4bit
    python launch/examples/lora_mlx_lm.py                   # alone: the same losses and norms

Without ``--model`` it is a tiny Llama that reads bytes. Rank 0 writes runs/lora.jsonl (``distclip report
runs/lora.jsonl`` draws it) and saves the adapters in runs/lora, for ``mlx_lm.generate --adapter-path runs/lora``.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics  # text that Python ships
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

import distclip as dc
from distclip.integrations.mlx_lm import train

ADAPTERS = Path("runs/lora")
LORA = {"rank": 8, "scale": 10.0, "dropout": 0.0}
LENGTH = 32  # tokens of a row


def load(name: str | None) -> tuple[Any, list[int]]:
    """A model, and the text as its tokens. A name is one for ``mlx_lm.load``, or a folder."""
    text = "\n".join(topics.values())
    if name:
        model, tokenizer = mlx_lm.load(name)[:2]
        return model, tokenizer.encode(text)
    shape: Any = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return llama.Model(llama.ModelArgs("llama", rms_norm_eps=1e-5, vocab_size=256, **shape)), list(text.encode())


def main(steps: int, name: str | None) -> None:
    world = dc.init()  # before anything else uses mx.distributed
    mx.random.seed(0)  # the same parameters on every rank
    np.random.seed(0)  # mlx-lm shuffles with NumPy, and all ranks must alike
    model, tokens = load(name)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    rows = [(tokens[i : i + LENGTH], 0) for i in range(0, len(tokens) - LENGTH, LENGTH)]  # 0: the loss begins there
    train_rows, valid_rows = rows[: len(rows) * 19 // 20], rows[len(rows) * 19 // 20 :]

    ADAPTERS.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
        (ADAPTERS / "adapter_config.json").write_text(json.dumps(config))
    args = TrainingArgs(
        batch_size=8,  # over all ranks
        iters=steps,
        val_batches=4,
        steps_per_report=10,
        adapter_file=str(ADAPTERS / "adapters.safetensors"),
    )
    rate = 1e-4 if name else 1e-3  # a trained model takes small steps
    train(model, optim.AdamW(rate), train_rows, valid_rows, args=args, max_norm=1.0, record="runs/lora.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", help="a name for mlx_lm.load, or a folder (default: a tiny model made here)")
    args = parser.parse_args()
    main(args.steps, args.model)
