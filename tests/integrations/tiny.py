"""A tiny Llama and batches for mlx-lm's own trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

import distclip as dc

TINY: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
TINY |= {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64}
LENGTH = 8


def tiny(kind: str = "lora", dtype: mx.Dtype = mx.float32, dropout: float = 0.0) -> Any:
    mx.random.seed(7)
    model = llama.Model(llama.ModelArgs(**TINY))
    model.set_dtype(dtype)
    model.freeze()
    if kind == "full":
        for layer in model.layers:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, 2, {"rank": 2, "scale": 4.0, "dropout": dropout}, use_dora=kind == "dora")
    mx.eval(model.parameters())
    return model


def batch(seed: int, rank: int, good: bool = True) -> tuple[mx.array, mx.array]:
    """One row that counts up, and where its loss begins and ends: for a bad one, behind its end."""
    start = (5 * seed + rank) % 40
    return mx.array([[start + i for i in range(LENGTH + 1)]]), mx.array([[0 if good else LENGTH + 5, LENGTH]])


def batches(world: dc.World, bad: tuple[int, ...] = (), between: Callable[[], None] = lambda: None) -> Any:
    """Batches of one row for each rank. The bad ones, counted from 1, are so on the last rank alone."""

    def iterate(*_: Any, **__: Any) -> Iterator[tuple[mx.array, mx.array]]:
        number = 0
        while True:
            between()
            number += 1
            yield batch(number, world.rank, number not in bad or world.rank < world.size - 1)

    return iterate


def folder_of_lora(folder: Path) -> Path:
    """A folder with a model, a tokenizer of single characters, and data in which two prompts are too long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): number for number, code in enumerate(range(32, 95))} | {"</s>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}</s>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)
    fast.save_pretrained(folder / "model")
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(**TINY))
    mx.save_safetensors(str(folder / "model/model.safetensors"), dict(leaves(model.parameters())))
    (folder / "model/config.json").write_text(json.dumps(TINY | {"eos_token_id": 63}))
    (folder / "data").mkdir()
    good = [{"prompt": "A" * (i % 4 + 1), "completion": "BCDEFGH"} for i in range(14)]
    long = [{"prompt": "A" * 40, "completion": "B"}] * 2
    for name, rows in {"train": good + long, "valid": good}.items():
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folder: Path, iters: int, **others: Any) -> trainer.TrainingArgs:
    given: dict[str, Any] = {"steps_per_report": 1, "adapter_file": str(folder / "adapters.safetensors")} | others
    return trainer.TrainingArgs(batch_size=1, iters=iters, **given)


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def copied(tree: Any) -> dict[str, tuple[str, bytes]]:
    return {path: (str(x.dtype), np.array(x).tobytes()) for path, x in leaves(tree)}


def weights(model: Any) -> dict[str, tuple[str, bytes]]:
    return copied(model.trainable_parameters())


class Seen:
    """A training callback that keeps what it is told."""

    def __init__(self) -> None:
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train.append(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.valid.append(info)
