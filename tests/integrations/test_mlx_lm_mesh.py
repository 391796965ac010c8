"""mlx-lm's trainer over a mesh: the losses of the whole model, and whole weights in the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from reference import WORLD, mesh

import distclip as dc
from distclip.integrations.mlx_lm import evaluate, shard, train
from distclip.integrations.whole import sharding_of
from integrations.architectures import make
from integrations.test_shard import assert_copies_are_the_same_bits, flat, in_pairs, over_two
from integrations.tiny import Seen

STEPS, ROWS, MAX_NORM = 10, 4, 0.5
RATE = {"full": 1e-3, "LoRA before": 1e-2, "LoRA after": 1e-2}
LORA: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0}
TESTED = [("llama", "full"), ("llama", "LoRA after")]
if "DISTCLIP_TEST_ALL_MODELS" in os.environ:
    names = ("llama", "qwen3", "qwen3_moe", "qwen3_5")
    TESTED = [(name, kind) for name in names for kind in ("full", "LoRA before", "LoRA after")]


def rows(number: int = 24) -> list[tuple[list[int], int]]:
    """Of one length, so that each rank has as many tokens."""
    return [([(7 * i + j * (i % 5 + 1)) % 64 for j in range(12)], 0) for i in range(number)]


def arguments(folder: Path, **others: Any) -> trainer.TrainingArgs:
    given: dict[str, Any] = {
        "steps_per_report": 1,
        "adapter_file": str(folder / "adapters.safetensors"),
        "iters": STEPS,
    } | others
    return trainer.TrainingArgs(batch_size=ROWS, **given)


def seed_by_rank() -> None:
    """The seeds of rank 0 are those of the run."""
    np.random.seed(3 + 10 * WORLD.rank)
    mx.random.seed(3 + 10 * WORLD.rank)


def prepared(name: str, kind: str) -> Any:
    model = make(name)
    if kind != "full":
        model.freeze()
    if kind == "LoRA before":
        mx.random.seed(3)
        linear_to_lora_layers(model, 2, LORA)
    if kind == "LoRA after":
        shard(model, over_two())
        mx.random.seed(3 + 10 * WORLD.rank)
        linear_to_lora_layers(model, 2, LORA)
    return model


def trained_whole(name: str, kind: str) -> tuple[Any, list[float]]:
    """One process with the whole model and all rows."""
    model = make(name)
    if kind != "full":
        model.freeze()
        mx.random.seed(3)
        linear_to_lora_layers(model, 2, LORA)
    optimizer = dc.ClippedOptimizer(optim.AdamW(RATE[kind]), dc.Clipper(MAX_NORM, layout=dc.Replicated()))
    np.random.seed(3)
    losses = []
    every = trainer.iterate_batches(rows(), ROWS, 2048, loop=True)
    for _, batch in zip(range(STEPS), every, strict=False):
        (loss, _), grads = nn.value_and_grad(model, trainer.default_loss)(model, *batch)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert optimizer.clipper.state["clipped"].item() > STEPS / 2
    return model, losses


@in_pairs
@pytest.mark.parametrize(("name", "kind"), TESTED)
def test_losses_and_files_are_those_of_the_whole_model(name: str, kind: str, tmp_path: Path) -> None:
    whole, expected = trained_whole(name, kind)
    model, seen = prepared(name, kind), Seen()
    seed_by_rank()
    args = arguments(tmp_path, steps_per_save=STEPS)
    options: dict[str, Any] = {"training_callback": seen, "max_norm": MAX_NORM, "mesh": over_two()}
    train(model, optim.AdamW(RATE[kind]), rows(), args=args, **options)
    assert [info["train_loss"] for info in seen.train] == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < expected[0] - 0.01
    tokens = STEPS * ROWS * 12
    assert seen.train[-1]["trained_tokens"] == tokens
    sharding: Any = sharding_of(model)
    assert_copies_are_the_same_bits(model, sharding.layout)
    WORLD.barrier()
    if WORLD.rank > 0:
        assert list(tmp_path.iterdir()) == []
    else:
        assert sorted(file.name for file in tmp_path.iterdir()) == [
            "0000010_adapters.safetensors",
            "adapters.safetensors",
        ]
        assert_loads(make(name), whole, kind, tmp_path)


def assert_loads(model: Any, whole: Any, kind: str, folder: Path) -> None:
    """mlx-lm loads the file into a whole model, which is the one that was trained whole."""
    config = {"fine_tune_type": "full" if kind == "full" else "lora", "num_layers": 2, "lora_parameters": LORA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_adapters(model, str(folder))
    expected = flat(whole.trainable_parameters())
    for path, leaf in flat(model.parameters()).items():
        if path in expected:
            close = np.isclose(np.array(leaf), np.array(expected[path]), rtol=1e-2, atol=1e-3)
            assert close.mean() > 0.99, path
    assert set(mx.load(str(folder / "adapters.safetensors"))) == set(expected)


@in_pairs
def test_evaluation_gives_the_loss_of_the_whole_model() -> None:
    model, whole = make("llama"), make("llama")
    np.random.seed(WORLD.rank)
    losses = [trainer.default_loss(whole, *batch) for batch in trainer.iterate_batches(rows(), ROWS, 2048)]
    expected = float(np.mean([loss.item() for loss, _ in losses]))
    assert evaluate(model, rows(), ROWS, -1, mesh=over_two()) == pytest.approx(expected, rel=1e-5)
    seen = Seen()
    options: dict[str, Any] = {"training_callback": seen, "mesh": over_two()}
    with TemporaryDirectory() as folder:
        train(model, optim.SGD(0.0), rows(), rows(), arguments(Path(folder), iters=1, val_batches=-1), **options)
    assert seen.valid[0]["val_loss"] == pytest.approx(expected, rel=1e-5)


@in_pairs
def test_ranks_along_tp_with_different_batches_are_stopped(tmp_path: Path) -> None:
    def iterate(*_: Any, **__: Any) -> Iterator[Any]:
        while True:
            yield mx.full((1, 9), over_two().coordinates()["tp"], mx.int32), mx.array([[0, 8]])

    with pytest.raises(ValueError, match="Ranks along 'tp' have different batches"):
        train(
            make("llama"), optim.SGD(1e-3), rows(), args=arguments(tmp_path), iterate_batches=iterate, mesh=over_two()
        )


@in_pairs
def test_a_mesh_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="over the axes 'dp' and 'tp'"):
        train(model, optim.SGD(1e-3), rows(), args=arguments(tmp_path), mesh=mesh(pp=WORLD.size, tp=1))
    shard(model, over_two())
    with pytest.raises(ValueError, match="pass mesh="):
        train(model, optim.SGD(1e-3), rows(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="over another mesh"):
        train(model, optim.SGD(1e-3), rows(), args=arguments(tmp_path), mesh=mesh(dp=WORLD.size, tp=1))


@in_pairs
def test_copies_that_differ_at_the_start_are_named(tmp_path: Path) -> None:
    model = prepared("llama", "LoRA after")
    model.model.layers[0].mlp.up_proj.lora_a = mx.random.normal((32, 4), key=mx.random.key(WORLD.rank))
    with pytest.raises(dc.LayoutError, match=r"parameters contradict.*\n  model.layers.0.mlp.up_proj.lora_a"):
        train(model, optim.SGD(1e-3), rows(), args=arguments(tmp_path), mesh=over_two())


@in_pairs
def test_what_cannot_be_sharded_or_fused_says_what_to_do() -> None:
    model = make("llama")
    linear_to_lora_layers(model, 2, LORA, use_dora=True)
    with pytest.raises(TypeError, match=r"layers.* has DoRA.* Use LoRA"):
        shard(model, over_two())
    model = prepared("llama", "LoRA after")
    with pytest.raises(TypeError, match=r"mlx_lm\.fuse"):
        model.layers[0].mlp.up_proj.fuse()
