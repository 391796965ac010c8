"""mlx-lm's own trainer with clipping and the guard: a tiny Llama, and a batch with nothing to learn.

All of that batch is masked, so its loss is 0 / 0: what mlx-lm makes of prompts longer than ``--max-seq-length``.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from launching import MPIRUN, SHARE_CORES, launch
from mlx_lm.models import llama
from mlx_lm.tuner import trainer

import distclip as dc
from distclip.integrations.mlx_lm import main, train
from distclip.records.read import read_records
from integrations.tiny import (
    Seen,
    arguments,
    batch,
    batches,
    copied,
    folder_of_lora,
    leaves,
    tiny,
    weights,
)

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": lambda rate: optim.Adafactor(learning_rate=rate),
}  # those of mlx_lm.lora


def is_finite(model: Any) -> bool:
    return all(mx.all(mx.isfinite(x)).item() for _, x in leaves(model.parameters()))


def loss_of(model: Any) -> float:
    return float(np.mean([trainer.default_loss(model, *batch(i, 0))[0].item() for i in range(1, 9)]))


# ------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_one_bad_batch_loses_the_run_without_distclip_and_not_with_it(
    kind: str, world: dc.World, tmp_path: Path
) -> None:
    lost = tiny(kind)
    trainer.train(
        lost, optim.Adam(1e-2), None, args=arguments(tmp_path, 20), iterate_batches=batches(world, bad=(5, 11))
    )
    assert not is_finite(lost)

    model = tiny(kind)
    before = loss_of(model)
    clipper = train(
        model, optim.Adam(1e-2), None, args=arguments(tmp_path, 20), iterate_batches=batches(world, bad=(5, 11))
    )
    assert is_finite(model)
    assert loss_of(model) < before - 0.2
    assert (clipper.state["step"].item(), clipper.state["bad"].item()) == (20, 2)


@pytest.mark.parametrize("bad", [(1,), (3,)], ids=["first", "third"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_weights_and_optimizer_state_as_they_were(
    name: str, bad: tuple[int, ...], world: dc.World, tmp_path: Path
) -> None:
    model, optimizer = tiny("full"), OPTIMIZERS[name](optim.cosine_decay(1e-2, 10))
    optimizer.init(model.trainable_parameters())
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.append({"model": weights(model), "optimizer": copied(optimizer.state)})

    train(model, optimizer, None, args=arguments(tmp_path, 5), iterate_batches=batches(world, bad, look))
    look()
    for number in range(1, 6):  # the trainer asks for a batch before a step
        changed = {what: seen[number - 1][what] != seen[number][what] for what in ("model", "optimizer")}
        assert changed == dict.fromkeys(changed, number not in bad), f"step {number}"


def test_float16_gradients_that_overflow_under_a_finite_loss_are_skipped(world: dc.World, tmp_path: Path) -> None:
    def weighted(model: Any, tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        loss, count = trainer.default_loss(model, tokens, lengths)
        return loss * mx.where(tokens[0, 0] == 20, 1e8, 1.0), count  # the fourth batch of rank 0

    def fine_tuned(trained: Callable[..., Any]) -> tuple[Any, list[float]]:
        model, seen = tiny("lora", mx.float16), Seen()
        others = {"iterate_batches": batches(world), "training_callback": seen}
        trained(model, optim.SGD(1e-2), None, args=arguments(tmp_path, 7), loss=weighted, **others)
        return model, [info["train_loss"] for info in seen.train]

    model, losses = fine_tuned(trainer.train)
    assert not is_finite(model)
    assert math.isfinite(losses[3])
    assert not math.isfinite(losses[4])
    model, losses = fine_tuned(train)
    assert is_finite(model)
    assert all(map(math.isfinite, losses))


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_weights_it_began_with(
    world: dc.World, tmp_path: Path
) -> None:
    model = tiny()
    before = weights(model)
    always = tuple(range(1, 100))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        train(
            model,
            optim.Adam(1e-2),
            None,
            args=arguments(tmp_path, 50),
            iterate_batches=batches(world, always),
            max_consecutive_skips=2,
            record=tmp_path / "run.jsonl",
        )
    assert weights(model) == before
    if world.rank == 0:
        assert [step["skipped"] for step in read_records(tmp_path / "run.jsonl").steps] == [True] * 3


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_other_policies(nonfinite: str, world: dc.World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    clipper = train(
        model,
        optim.Adam(1e-2),
        None,
        args=arguments(tmp_path, 4),
        iterate_batches=batches(world, bad=(3,)),
        nonfinite=nonfinite,
    )
    assert is_finite(model) == (nonfinite == "zero")
    assert clipper.state["bad"].item() == (1 if nonfinite == "zero" else 2)
    assert ("distclip: the norm of step 3 is nan" in capsys.readouterr().out) == (world.rank == 0)


def test_raise_is_refused() -> None:
    with pytest.raises(ValueError, match="'skip', 'zero', 'propagate' with mlx-lm, not 'raise'"):
        train(tiny(), optim.Adam(1e-2), None, nonfinite="raise")


# ---------------------------------------------------------------------------------------- the clipping


def test_without_anything_to_clip_training_is_the_same_to_the_bit(world: dc.World, tmp_path: Path) -> None:
    plain, clipped = tiny("full"), tiny("full")
    trainer.train(plain, optim.AdamW(1e-3), None, args=arguments(tmp_path, 6), iterate_batches=batches(world))
    train(
        clipped,
        optim.AdamW(1e-3),
        None,
        args=arguments(tmp_path, 6),
        iterate_batches=batches(world),
        max_norm=math.inf,
    )
    assert weights(plain) == weights(clipped)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_clips_the_average_over_ranks_and_accumulated_batches(
    accumulated: int, checkpointed: bool, world: dc.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = tiny("full"), tiny("full")

    def mean_loss(model: Any) -> mx.array:
        every = [batch(i, rank) for i in range(1, accumulated + 1) for rank in range(world.size)]
        return sum((trainer.default_loss(model, *one)[0] for one in every), mx.array(0.0)) / len(every)

    grads = nn.value_and_grad(expected, mean_loss)(expected)[1]
    grads, norm = optim.clip_grad_norm(grads, 0.1)
    optim.SGD(1.0).update(expected, grads)

    # The trainer replaces the method of the class, for good.
    monkeypatch.setattr(llama.TransformerBlock, "__call__", llama.TransformerBlock.__call__)
    seen = Seen()
    others = {"grad_accumulation_steps": accumulated, "grad_checkpoint": checkpointed}
    clipper = train(
        model,
        optim.SGD(1.0),
        None,
        args=arguments(tmp_path, accumulated, steps_per_report=accumulated, **others),
        iterate_batches=batches(world),
        training_callback=seen,
        max_norm=0.1,
    )
    assert clipper.state["step"].item() == clipper.state["clipped"].item() == 1
    assert seen.train[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for (path, value), (_, target) in zip(leaves(model.parameters()), leaves(expected.parameters()), strict=True):
        np.testing.assert_allclose(np.array(value), np.array(target), rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_bad_batch_among_accumulated_ones_costs_that_update_alone(world: dc.World, tmp_path: Path) -> None:
    model, optimizer = tiny(), optim.Adam(1e-2)
    args = arguments(tmp_path, 8, grad_accumulation_steps=2)
    clipper = train(model, optimizer, None, args=args, iterate_batches=batches(world, bad=(3,)))
    assert is_finite(model)
    assert (clipper.state["step"].item(), clipper.state["bad"].item(), optimizer.step.item()) == (4, 1, 3)


def test_ranks_keep_the_same_weights(world: dc.World, tmp_path: Path) -> None:
    model = tiny("full")
    train(
        model,
        optim.Adam(1e-2),
        None,
        args=arguments(tmp_path, 8),
        iterate_batches=batches(world, bad=(5,)),
        max_norm=dc.AutoClip(50),
    )
    flat = mx.concatenate([x.reshape(-1) for _, x in leaves(model.trainable_parameters())])
    assert mx.array_equal(mx.distributed.all_sum(flat, group=world.group), flat * world.size)


def test_mlx_lm_s_own_train_takes_a_clipped_optimizer(world: dc.World, tmp_path: Path) -> None:
    model, clipper = tiny(), dc.Clipper(max_norm=1.0, layout=dc.Replicated(), check="never")
    optimizer = dc.ClippedOptimizer(optim.Adam(1e-2), clipper)
    trainer.train(model, optimizer, None, args=arguments(tmp_path, 12), iterate_batches=batches(world, bad=(1, 5)))
    assert is_finite(model)
    assert [clipper.state[name].item() for name in ("step", "bad", "in_a_row")] == [12, 2, 0]
    assert clipper.state["clipped"].item() > 0


def test_spikes_are_skipped_and_named(world: dc.World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = {
        "iterate_batches": batches(world, bad=(2,)),
        "skip_above": lambda step: mx.where(step == 2, 1e-6, 1e6),
    }
    clipper = train(tiny("full"), optim.Adam(1e-2), None, args=arguments(tmp_path, 5), max_norm=1.0, **options)
    # The schedule waits for skipped steps, as the optimizer's does, so step 4 is its step 2 until it passes.
    assert [clipper.state[name].item() for name in ("step", "bad", "spikes")] == [5, 3, 2]
    if world.rank == 0:
        told = capsys.readouterr().out
        assert "distclip: the norm of step 2 is nan; the step was skipped" in told
        assert re.search(r"distclip: the norm of step 4 is [\d.]+, above 1e-06; the step was skipped", told)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)], ids=repr)
def test_a_max_norm_of_0_clips_nothing(zero: Any, world: dc.World, tmp_path: Path) -> None:
    def trained(max_norm: Any) -> tuple[Any, dc.Clipper]:
        model = tiny("full")
        record = tmp_path / f"{max_norm}.jsonl"
        options: Any = {"iterate_batches": batches(world, bad=(2,)), "max_norm": max_norm, "record": record}
        clipper = train(model, optim.Adam(1e-2), None, args=arguments(tmp_path, 4), **options)
        if world.rank == 0:
            assert [step["finite"] for step in read_records(record).steps] == [True, False, True, True]
        return weights(model), clipper

    off, clipper = trained(zero)
    assert off == trained(math.inf)[0]
    assert [clipper.state[name].item() for name in ("step", "clipped", "bad")] == [4, 0, 1]
    with pytest.raises(ValueError, match=r"max_norm should be >= 0, -1\.0 was"):
        trained(-1.0)


# ------------------------------------------------------------------------------------- what it tells


def test_the_trainer_s_reports_say_what_was_clipped(
    world: dc.World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, shown = Seen(), list[tuple[int, float]]()
    # The trainer looks at the length of the data for validation alone.
    train(
        tiny(),
        optim.Adam(1e-3),
        None,
        [0] * 3,
        arguments(tmp_path, 4, val_batches=1),
        iterate_batches=batches(world, bad=(3,)),
        training_callback=seen,
        max_norm=1e-3,
        record=tmp_path / "run.jsonl",
        sinks=[lambda numbers, step: shown.append((step, numbers["grad_norm"]))],
    )
    assert [info["nonfinite_steps"] for info in seen.train] == [0, 0, 1, 1]
    assert [info["clipped_share"] for info in seen.train] == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert [info["iteration"] for info in seen.valid] == [0, 3]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("distclip:")]
    if world.rank > 0:
        assert told == []
        return
    norms = [info["grad_norm"] for info in seen.train]
    assert told[-1] == f"distclip: 4 steps, 75% clipped, 1 skipped, last norm {norms[-1]:.4g}"
    assert "distclip: the norm of step 3 is nan; the step was skipped" in told
    record = read_records(tmp_path / "run.jsonl")
    np.testing.assert_array_equal([step["norm"] for step in record.steps], norms)
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    np.testing.assert_array_equal([norm for _, norm in shown], norms)
    config = record.headers[0]["config"]
    assert (config["iters"], config["max_norm"], config["nonfinite"]) == (4, 1e-3, "skip")
    for name, reported in (("loss", "train_loss"), ("learning_rate",) * 2, ("trained_tokens",) * 2):
        numbers = [step[name] for step in record.steps]
        np.testing.assert_array_equal(numbers, [info[reported] for info in seen.train])
    valid = {step["step"]: step["valid"] for step in record.steps if "valid" in step}
    assert valid == {1: seen.valid[0]["val_loss"], 4: seen.valid[1]["val_loss"]}, "before these steps"


def test_a_loss_that_is_reported_between_updates_goes_to_the_next(world: dc.World, tmp_path: Path) -> None:
    args = arguments(tmp_path, 4, grad_accumulation_steps=2)
    seen, record = Seen(), tmp_path / "run.jsonl"
    train(
        tiny(),
        optim.Adam(1e-3),
        None,
        None,
        args,
        iterate_batches=batches(world),
        training_callback=seen,
        record=record,
    )
    if world.rank == 0:
        losses = [info["train_loss"] for info in seen.train]
        assert [step["loss"] for step in read_records(record).steps] == [losses[1], losses[3]]


# --------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_lora(tmp_path_factory.mktemp("lora"))


OF_LORA = ["--model", "model", "--data", "data", "--train", "--mask-prompt", "--batch-size", "2", "--iters", "24"]
OF_LORA += ["--max-seq-length", "24", "--learning-rate", "5e-3", "--num-layers", "2", "--steps-per-report", "6"]
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def adapters(folder: Path) -> list[mx.array]:
    return list(mx.load(str(folder / "adapters.safetensors")).values())  # type: ignore[union-attr]


@pytest.mark.launches
def test_plain_mlx_lm_ends_in_nan_on_this_data(lora: Path, tmp_path: Path) -> None:
    ended = launch(
        [sys.executable, "-m", "mlx_lm", "lora", *OF_LORA, "--adapter-path", str(tmp_path)], lora, OFFLINE, limit_s=60
    )
    assert ended.code == 0, ended.output
    assert not all(mx.all(mx.isfinite(x)).item() for x in adapters(tmp_path))


@pytest.mark.launches
@pytest.mark.parametrize("ranks", [0, 1, 2], ids=["alone", "mpirun-1", "mpirun-2"])
@pytest.mark.parametrize(
    "options", [["--max-grad-norm", "0.5"], ["--auto-clip", "50", "--nonfinite", "zero"]], ids=["fixed", "auto"]
)
def test_the_command(options: list[str], ranks: int, lora: Path, tmp_path: Path) -> None:
    under = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks else []
    command = [*under, sys.executable, "-m", "distclip.integrations.mlx_lm", "lora", *options]
    command += ["--record", str(tmp_path / "run.jsonl"), "--", *OF_LORA, "--adapter-path", str(tmp_path)]
    ended = launch(command, lora, OFFLINE, limit_s=60)
    assert ended.code == 0, ended.output
    assert all(mx.all(mx.isfinite(x)).item() for x in adapters(tmp_path))
    record = read_records(tmp_path / "run.jsonl")
    bad = [step for step in record.steps if not step["finite"]]
    assert len(record.steps) == 24
    assert 1 <= len(bad) <= 4
    header = record.headers[0]
    assert header["ranks"] == max(ranks, 1)
    assert (header["config"]["model"], header["config"]["optimizer"], header["config"]["iters"]) == (
        "model",
        "adam",
        24,
    )
    assert [step["step"] for step in record.steps if "loss" in step] == [6, 12, 18, 24]
    assert record.steps[5]["learning_rate"] == pytest.approx(5e-3)
    assert all(step["skipped"] == ("zero" not in options) for step in bad)
    assert ended.output.count(f"distclip: the norm of step {bad[0]['step']} is nan") == 1
    assert ended.output.count("distclip: 24 steps, ") == 1


@pytest.mark.launches
def test_a_wrong_option_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lora", "--nonfinite", "raise", "--", "--train"])
    assert "invalid choice: 'raise'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["lora", "--model", "model"])
    assert "after --" in capsys.readouterr().err
    for option, value in (("--max-grad-norm", "-1"), ("--max-grad-norm", "nan"), ("--auto-clip", "101")):
        with pytest.raises(SystemExit) as ended:
            main(["lora", option, value, "--", "--train"])
        assert ended.value.code == 2
        assert f"argument {option}: should be between 0 and " in capsys.readouterr().err.splitlines()[-1]
