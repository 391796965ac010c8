"""The main job, ``launch/train.py``: the same run on every layout, whole checkpoints, and what it shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import MPIRUN, SHARE_CORES, Ended, environment, launch, on_terminal

import distclip as dc

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "launch/train.py")
SMALL = {"context": 32, "batch-size": 8, "steps": 50, "valid-every": 25, "checkpoint-every": 0, "warm-up": 5}
LIMIT_S = 100


def train(ranks: int, folder: Path, **options: Any) -> tuple[Ended, list[dict[str, float]]]:
    """Run the job, and read its record of every step."""
    command = command_of(ranks, record="run.jsonl", **options)
    ended = launch(command, folder, limit_s=LIMIT_S)
    record = folder / "run.jsonl"
    steps = dc.read_records(record).steps if record.exists() else []
    return ended, [{name: step[name] for name in ("step", "loss", "norm", "valid") if name in step} for step in steps]


def command_of(ranks: int, **options: Any) -> list[str]:
    chosen = SMALL | {name.replace("_", "-"): value for name, value in options.items()}
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()]
    mpirun = [str(MPIRUN), "-n", str(ranks), *SHARE_CORES] if ranks > 1 else []
    return [*mpirun, sys.executable, TRAIN, *arguments]


@pytest.fixture(scope="module")
def steps_alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    ended, steps = train(1, tmp_path_factory.mktemp("alone"))
    assert ended.code == 0, ended.output
    assert sum(step["norm"] > 0.5 for step in steps) > 10, "clipping was to be active"
    return steps


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(4, "dp"), (2, "tp"), (4, "tp"), (2, "fsdp"), (4, "fsdp"), (2, "dp+tp"), (4, "dp+tp")],
)
def test_every_layout_makes_the_same_run(
    ranks: int, parallel: str, steps_alone: list[dict[str, float]], tmp_path: Path
) -> None:
    ended, steps = train(ranks, tmp_path, parallel=parallel)
    assert ended.code == 0, ended.output
    assert len(steps) == len(steps_alone) == 50
    for one, other in zip(steps_alone, steps, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-3), f"{name} at step {one['step']}"


def test_clipping_rescues_a_run_that_diverges(tmp_path: Path) -> None:
    options = {"optimizer": "sgd", "learning-rate": 1, "warm-up": 20, "valid-every": 10, "steps": 60}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unclipped, without = train(1, tmp_path / "a", max_norm="inf", **options)
    clipped, with_ = train(1, tmp_path / "b", max_norm=0.5, **options)
    assert unclipped.code == clipped.code == 0
    assert not max(step["loss"] for step in without) <= 2 * without[0]["loss"]  # NaN is divergence too
    valid = [step["valid"] for step in with_ if "valid" in step]
    assert valid[-1] < valid[0]
    assert valid[-1] < 0.6 * with_[0]["loss"]


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "dp"), (3, "dp"), (2, "fsdp"), (4, "dp+tp")])
def test_a_resumed_run_ends_in_the_same_bits(ranks: int, parallel: str, tmp_path: Path) -> None:
    options = {"parallel": parallel, "steps": 12, "checkpoint-every": 6, "batch-size": 12}
    whole, steps = train(ranks, tmp_path, checkpoint="whole", **options)
    assert whole.code == 0, whole.output
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole/step-00000006").rename(tmp_path / "cut/step-00000006")
    resumed, more = train(ranks, tmp_path, checkpoint="cut", resume=True, **options)
    assert resumed.code == 0, resumed.output
    assert more == steps
    pieces = sorted((tmp_path / "whole/step-00000012").glob("*.safetensors"))
    assert len(pieces) == {"dp": 1, "fsdp": 2, "dp+tp": 2}[parallel]
    for piece in pieces:
        ours: Any = mx.load(str(piece))
        theirs: Any = mx.load(str(tmp_path / "cut/step-00000012" / piece.name))
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name], equal_nan=True).item() for name in ours)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "dp"), (2, "fsdp")])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(ranks: int, parallel: str, tmp_path: Path) -> None:
    options = {"parallel": parallel, "checkpoint-every": 1, "checkpoint": "ck", "valid-every": 1000}
    for extra_s in (0.0, 0.13, 0.31):
        command = command_of(ranks, steps=100000, **options, **({"resume": True} if extra_s else {}))
        before = newest(tmp_path / "ck")
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + LIMIT_S
        while newest(tmp_path / "ck") <= before + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(extra_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        time.sleep(1)  # mpirun's ranks see that it is gone
        assert newest(tmp_path / "ck") > before
    last = newest(tmp_path / "ck")
    ended, _ = train(ranks, tmp_path, steps=last + 2, resume=True, **options)
    assert ended.code == 0, ended.output
    assert newest(tmp_path / "ck") == last + 2
    assert len(list((tmp_path / "ck").glob("step-*"))) == 2, "older checkpoints are removed"


def newest(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"accumulate": 2}], ids=["bfloat16", "accumulated"])
def test_the_loss_falls(options: dict[str, Any], tmp_path: Path) -> None:
    ended, steps = train(2, tmp_path, steps=40, **options)
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    runs = {}
    for ranks, parallel in ((1, "dp"), (2, "dp"), (2, "tp")):
        folder = tmp_path / f"{ranks}{parallel}"
        folder.mkdir()
        _, runs[folder.name] = train(ranks, folder, steps=5, accumulate=3, parallel=parallel)
    for steps in runs.values():
        for one, other in zip(runs["1dp"], steps, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-3)


def test_it_reads_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the same words again and again. " * 200)
    ended, steps = train(1, tmp_path, data="text", steps=30)
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < 2.5


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (3, {}, "--batch-size 8 cannot be divided among the 3 ranks"),
        (3, {"parallel": "dp+tp"}, "--parallel dp+tp needs an even number of ranks, not 3"),
        (3, {"parallel": "tp"}, "--heads 4 cannot be divided among 3 tp ranks"),
        (1, {"resume": True}, "there is no checkpoint in"),
        (1, {"steps": 0}, "--steps must be at least 1"),
        (1, {"dims": 60, "heads": 8}, "--dims 60 must be a multiple of 2 x --heads 8"),
        (1, {"max-norm": -1}, "max_norm should be >= 0, -1.0 was provided"),
        (1, {"data": "missing.txt"}, "missing.txt"),
    ],
)
def test_a_mistake_gets_one_clear_error(ranks: int, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    ended, _ = train(ranks, tmp_path, **({"steps": 2} | options))
    assert ended.code != 0
    assert message in ended.output


def test_a_checkpoint_is_not_taken_up_by_another_layout(tmp_path: Path) -> None:
    options = {"steps": 2, "checkpoint": "ck", "checkpoint-every": 1}
    assert train(2, tmp_path, parallel="tp", **options)[0].code == 0
    ended, _ = train(2, tmp_path, parallel="fsdp", resume=True, **options)
    assert ended.code != 0
    assert "was written with parallel = tp, and this run has fsdp" in ended.output


def test_a_checkpoint_is_not_taken_up_by_another_model(tmp_path: Path) -> None:
    options = {"steps": 2, "checkpoint": "ck", "checkpoint-every": 1}
    assert train(1, tmp_path, **options)[0].code == 0
    for other in ({"layers": 3}, {"dims": 32}, {"optimizer": "sgd"}, {"dtype": "bfloat16"}):
        ended, _ = train(1, tmp_path, resume=True, **options, **other)
        assert ended.code != 0
        assert f"was written with {next(iter(other))} = " in ended.output
    ended, _ = train(1, tmp_path, resume=True, **options)
    assert ended.code == 0
    assert "nothing to do: the checkpoint has seen 2 steps" in ended.output


def test_a_fresh_run_keeps_the_checkpoints_of_an_earlier_one(tmp_path: Path) -> None:
    for steps in (4, 2):
        assert train(2, tmp_path, steps=steps, checkpoint="ck", checkpoint_every=1)[0].code == 0
    assert newest(tmp_path / "ck-1") == 4
    assert newest(tmp_path / "ck") == 2


def test_a_run_may_start_without_warm_up(tmp_path: Path) -> None:
    ended, steps = train(1, tmp_path, steps=10, warm_up=0)
    assert ended.code == 0, ended.output
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_terminal_sees_a_bar_and_a_file_sees_lines(tmp_path: Path) -> None:
    ended, _ = train(1, tmp_path, steps=4, log_every=2)
    lines = ended.output.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4"]
    assert all(word in lines[-1] for word in ("loss", "valid", "norm", "clipped", "tokens/s"))

    shown = on_terminal(command_of(1, steps=4), tmp_path, limit_s=LIMIT_S)
    assert b"[####################] step 4/4" in shown
    assert shown.count(b"\r[") == 4
