"""Trackers: what they get, when, under which names; and that a run goes on and ends whatever they do.

The packages run offline, each in a process of its own. ``DISTCLIP_REQUIRE_TRACKERS=1`` demands those of the extra
``trackers``; without it a package that is not installed is left out.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import Ended, alone, under_mpirun

import distclip as dc
from distclip.records.read import read_records

REQUIRED = os.environ.get("DISTCLIP_REQUIRE_TRACKERS") == "1"
OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
BEGIN = """
import sys, time
import distclip as dc
import mlx.core as mx

world = dc.init()
clipper = dc.Clipper(1.0, layout=dc.Replicated(), groups={"a[*]": "a"})

def steps(recorder, first=1, last=5):
    for step in range(first, last + 1):
        bad = float("nan") if step == 3 else 1.0
        grads, report = clipper({"a": mx.array([3.0, 4.0]) * bad})
        mx.eval(grads, report.arrays)
        recorder(report, step=step, loss=2.0 * step)

def wait_for(recorder):  # until it has taken all but the last step: a tracker starts in a second or two
    while not all(background._queue.empty() for background in recorder._backgrounds):
        time.sleep(0.01)
"""
PLAIN = (
    "with dc.Recorder('run.jsonl', config={'lr': 0.1, 'optimizer': {'betas': [0.9, 0.99]}}, sinks=[%r]) as record:\n"
)
PLAIN += "    steps(record)\n    wait_for(record)\n"
WITH = "with dc.Recorder(None, sinks=[Said()]) as record:"
WITHOUT = "record = dc.Recorder(None, sinks=[Said()])\nif True:"


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, start: Any = None, log: Any = None, finish: Any = None) -> None:
        self.told: list[Any] = []
        self._failing = {"start": start, "log": log, "finish": finish}

    def _tell(self, kind: str, *told: Any) -> None:
        self.told.append((kind, *told))
        if self._failing[kind] is not None:
            self._failing[kind]()

    def start(self, config: dict[str, Any]) -> None:
        self._tell("start", config, threading.current_thread().name)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._tell("log", numbers, step)

    def finish(self, status: str) -> None:
        self._tell("finish", status)

    def steps(self) -> list[int]:
        return [told[2] for told in self.told if told[0] == "log"]


def fail() -> None:
    raise OSError("no network\nand a long story")


def numbers(step: int, norm: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "norm": norm, "threshold": 1.0} | more


# ----------------------------------------------------------------------------------------- what a tracker gets


def test_a_tracker_gets_the_configuration_the_numbers_and_the_end(world: dc.World, tmp_path: Path) -> None:
    kept, called = Kept(), []
    clipper = dc.Clipper(1.0, groups={"a": "a*"}, average=True, rank_batch=4)
    with dc.Recorder(None, config={"lr": 0.1, "file": tmp_path}, sinks=[kept, lambda *told: called.append(told)]) as r:
        for _ in range(3):
            grads, report = clipper({"a": mx.array([3.0, 4.0]), "b": mx.array([1.0])})
            mx.eval(grads, report.arrays)
            r(report, loss=mx.array(2.0), valid=None)
    if world.rank > 0:
        assert kept.told == called == []
        return
    (_, config, thread), *logged, finish = kept.told
    assert thread == "distclip-record"
    assert (config["lr"], config["file"], config["ranks"]) == (0.1, str(tmp_path), world.size)
    assert config["host"]
    assert json.loads(json.dumps(config)) == config
    assert [step for _, _, step in logged] == [1, 2, 3]
    assert finish == ("finish", "finished")
    _, named, _ = logged[1]
    expected = {"grad_norm", "threshold", "scale", "finite", "clipped", "skipped", "grad_norm/a", "grad_norm/other"}
    expected |= {"loss", "step_s"} | {f"rank_norm/{rank}" for rank in range(world.size)}
    expected |= {"noise_scale"} if world.size > 1 else set()
    assert set(named) == expected
    assert named["grad_norm"] == pytest.approx(math.sqrt(26))
    assert named["clipped"] == 1.0
    assert all(type(number) is float for number in named.values())
    assert called == [(named, step) for (_, named, step) in logged]


def test_every_so_many_steps_as_the_file(world: dc.World, tmp_path: Path) -> None:
    kept = Kept()
    with dc.Recorder(tmp_path / "run.jsonl", every=10, sinks=kept) as recorder:  # a single one needs no list
        for i in range(1, 36):
            recorder(numbers(i, math.nan if i == 17 else 1.0))
    if world.rank == 0:
        assert kept.steps() == [1, 11, 17, 21, 31]
        assert [step["step"] for step in read_records(tmp_path / "run.jsonl").steps] == kept.steps()


def test_steps_never_fall_back(world: dc.World, capfd: pytest.CaptureFixture[str]) -> None:
    kept = Kept()
    with dc.Recorder(None, sinks=[kept]) as recorder:
        for i in (500, 501, 3, 4, 501, 502):  # a resumed run begins at 500
            recorder(numbers(i))
    if world.rank == 0:
        assert kept.steps() == [500, 501, 501, 502]
        assert capfd.readouterr().err.count("step 3 came after step 501") == 1


@pytest.mark.parametrize(
    ("sinks", "kind", "message"),
    [
        (["wandbb"], ValueError, "'wandbb' is no tracker: choose from 'mlflow', 'swanlab', 'tensorboard', 'wandb'"),
        ("wandbb", ValueError, "'wandbb' is no tracker"),
        ([3], TypeError, r"A sink is the name of a tracker .* not 3"),
        ({"wandb": {}}, TypeError, "object with start, log and finish, not {'wandb'"),
    ],
)
def test_what_is_no_tracker_is_named(sinks: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        dc.Recorder(None, sinks=sinks)


@pytest.mark.parametrize("name", ["mlflow", "swanlab", "tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(name: str, world: dc.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    if name == "tensorboard":
        monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    if world.rank == 0:
        with pytest.raises(ImportError, match=rf"^The tracker {name} needs the package {name}: pip install {name}$"):
            dc.Recorder(None, sinks=[name])
    else:
        dc.Recorder(None, sinks=[name]).close()  # which writes nothing


# ------------------------------------------------------------------------------- a run goes on whatever they do


@pytest.mark.parametrize("broken", ["start", "log", "finish"])
def test_an_error_is_said_once_and_the_run_goes_on(
    broken: str, world: dc.World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept, good = Kept(**{broken: fail}), Kept()
    with dc.Recorder(tmp_path / "run.jsonl", sinks=[kept, good]) as recorder:
        for i in range(1, 6):
            recorder(numbers(i))
    if world.rank == 0:
        said = "distclip: the tracker Kept cannot be written (no network): training goes on, and lines are dropped.\n"
        assert capfd.readouterr().err == said
        assert kept.steps() == ([] if broken == "start" else [1, 2, 3, 4, 5])
        assert good.steps() == [step["step"] for step in read_records(tmp_path / "run.jsonl").steps] == [1, 2, 3, 4, 5]


@pytest.mark.launches
def test_a_slow_tracker_costs_neither_time_nor_lines_of_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = Kept(log=lambda: time.sleep(0.02))
    recorder = dc.Recorder(tmp_path / "run.jsonl", sinks=[kept])
    started = time.perf_counter()
    for i in range(1, 3001):
        recorder(numbers(i))
        time.sleep(0.0002)
    assert time.perf_counter() - started < 15, (
        "each step waits for a slow disk, which would take 40 s, not for a tracker"
    )
    recorder._backgrounds[1]._given_up = True  # rather than waiting for 1,000 lines
    recorder.close()
    assert len(read_records(tmp_path / "run.jsonl").steps) == 3000
    assert "the tracker Kept takes lines too slowly" in capfd.readouterr().err
    assert kept.told[-1] == ("finish", "finished")


@pytest.mark.launches
@pytest.mark.parametrize("n", [1, 2])
def test_a_tracker_that_hangs_at_the_end_does_not_hold_the_job(n: int, tmp_path: Path) -> None:
    program = BEGIN + (
        "from distclip.records import write\nwrite.CLOSE_S = 1.0\n"
        "class Hanging:\n    def start(self, config): pass\n    def log(self, numbers, step): pass\n"
        "    def finish(self, status): time.sleep(60)\n"
        "with dc.Recorder(None, sinks=[Hanging]) as record:\n    steps(record)\nprint('trained')\n"
    )
    started = time.monotonic()
    ended = alone(program, tmp_path) if n == 1 else under_mpirun(n, program, tmp_path)
    assert ended.code == 0, ended.output
    assert time.monotonic() - started < 40
    assert ended.output.count("the tracker Hanging did not take the last lines within 1 s") == 1
    assert ended.output.count("trained") == n


def test_a_good_end_by_sys_exit_waits_for_trackers_as_any_good_end(world: dc.World) -> None:
    ended: list[str] = []

    def finish() -> None:
        time.sleep(1.5)
        ended.append("finished")

    recorder = dc.Recorder(None, sinks=[Kept(finish=finish)])
    recorder(numbers(1))
    with pytest.raises(SystemExit), recorder:
        sys.exit(0)
    assert ended == ["finished"] * (world.rank == 0)


@pytest.mark.launches
@pytest.mark.parametrize(
    ("n", "recording", "end", "status"),
    [
        (1, WITH, "raise ValueError('broken')", "failed"),
        (1, WITH, "sys.exit(3)", "failed"),
        (1, WITH, "sys.exit()", "finished"),
        (1, WITHOUT, "raise KeyboardInterrupt", "failed"),
        (1, WITHOUT, "pass", "finished"),
        (2, WITH, "raise ValueError('broken')", "failed"),
        (2, WITHOUT, "raise ValueError('broken')", "failed"),
    ],
)
def test_a_tracker_learns_how_the_job_ended(n: int, recording: str, end: str, status: str, tmp_path: Path) -> None:
    program = BEGIN + (
        "class Said:\n    def start(self, config): pass\n    def log(self, numbers, step): print('logged', step)\n"
        f"    def finish(self, status): print('status:', status, flush=True)\n{recording}\n"
        "    steps(record)\n    if world.rank > 0:\n        time.sleep(60)\n"  # or it ends the job first
        f"    {end}\n"
    )
    ended = alone(program, tmp_path) if n == 1 else under_mpirun(n, program, tmp_path)
    assert ended.output.count(f"status: {status}") == 1, ended.output
    assert ended.output.count("logged") == 5


# -------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_gets_the_same_numbers(world: dc.World, tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed: left out"
    )
    clipper = dc.Clipper(1.0, groups={"a": "a*"}, layout=dc.Replicated())
    with dc.Recorder(tmp_path / "run.jsonl", tensorboard=tmp_path / "board") as recorder:
        for i in range(5):
            bad = math.nan if i == 2 else 1.0
            _, report = clipper({"a": mx.array([3.0, 4.0]) * bad, "b": mx.array([2.0])})
            recorder(report, loss=2.5)
    if world.rank > 0:
        assert not (tmp_path / "board").exists()
        return
    assert not [thread for thread in threading.enumerate() if "record" in thread.name]
    accumulator = accumulators.EventAccumulator(str(tmp_path / "board"))
    accumulator.Reload()
    tags = {"grad_norm", "threshold", "scale", "clipped", "skipped", "grad_norm/a", "grad_norm/other", "loss"}
    assert tags <= set(accumulator.Tags()["tensors"])
    steps = {step["step"]: step["norm"] for step in read_records(tmp_path / "run.jsonl").steps}
    for event in accumulator.Tensors("grad_norm"):
        assert event.tensor_proto.float_val[0] == pytest.approx(steps[event.step], nan_ok=True)
    assert len(accumulator.Tensors("grad_norm")) == 5


def test_tensorboard_by_name_has_a_folder_for_each_run(
    world: dc.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: left out")
    monkeypatch.chdir(tmp_path)
    with dc.Recorder(None, sinks=["tensorboard"]) as recorder:
        recorder(numbers(1), loss=2.5)
    assert len(list(tmp_path.glob("runs/*/events*"))) == (world.rank == 0)


# --------------------------------------------------------------------------------- wandb, swanlab, mlflow, offline


def run(program: str, package: str, folder: Path, *, n: int = 1, code: int = 0, **variables: str) -> Ended:
    if find_spec(package) is None:
        if REQUIRED:
            pytest.fail(f"{package} is not installed, and DISTCLIP_REQUIRE_TRACKERS=1 says that it must be")
        pytest.skip(f"{package} is not installed: left out")
    settings = OFFLINE | {"HOME": str(folder), "NO_COLOR": "1"} | variables
    ended = alone(program, folder, **settings) if n == 1 else under_mpirun(n, program, folder, **settings)  # type: ignore[arg-type]
    assert ended.code == code, ended.output
    assert "cannot be written" not in ended.output, ended.output
    return ended


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb and swanlab write, behind a header of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        if 2**15 - place % 2**15 < 7:
            place += -place % 2**15
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its end
            yield parts
            parts = b""


def runs_of_wandb(folder: Path) -> dict[str, dict[str, Any]]:
    """By name: steps, config and exit code of each run in a folder."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    runs = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        kept: dict[str, Any] = {"steps": {}, "config": {}, "exit": None}
        for data in log_records(path):
            record = protocol.Record.FromString(data)
            if record.HasField("run"):
                kept["name"] = record.run.display_name
                kept["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                values = {name: json.loads(value) for name, value in items.items()}
                kept["steps"].setdefault(record.history.step.num, {}).update(values)
            if record.HasField("exit"):
                kept["exit"] = record.exit.exit_code
        runs[path.stem] = kept
    return runs


@pytest.mark.launches
@pytest.mark.parametrize("n", [1, 2])
def test_wandb(n: int, tmp_path: Path) -> None:
    run(BEGIN + PLAIN % "wandb", "wandb", tmp_path, n=n)
    (kept,) = runs_of_wandb(tmp_path).values()  # one run, however many ranks
    assert list(kept["steps"]) == [1, 2, 3, 4, 5]
    assert kept["steps"][2].items() >= {"grad_norm": 5.0, "clipped": 1.0, "loss": 4.0, "grad_norm/a[*]": 5.0}.items()
    assert math.isnan(float(kept["steps"][3]["grad_norm"]))
    assert kept["config"]["lr"] == 0.1
    assert kept["config"]["ranks"] == n
    assert kept["exit"] == 0


@pytest.mark.launches
def test_wandb_learns_of_a_failure_and_takes_options(tmp_path: Path) -> None:
    program = BEGIN + (
        "from distclip.records.trackers import Wandb\n"
        "with dc.Recorder(None, sinks=[Wandb(name='first', config={'mine': 1})], config={'lr': 1}) as record:\n"
        "    steps(record, 500, 504)\n    wait_for(record)\n    raise ValueError('broken')\n"
    )
    run(program, "wandb", tmp_path, code=1)
    (kept,) = runs_of_wandb(tmp_path).values()
    assert list(kept["steps"]) == [500, 501, 502, 503, 504]
    assert (kept["name"], kept["config"]["lr"], kept["config"]["mine"]) == ("first", 1, 1)
    assert kept["exit"] == 1


@pytest.mark.launches
def test_wandb_s_run_of_the_program_gets_the_numbers_and_goes_on(tmp_path: Path) -> None:
    """The program counts its steps itself, faster than the optimizer's, and none is lost."""
    program = BEGIN + (
        "import wandb\n"
        "with dc.Recorder(None, sinks=['wandb']) as record:\n"
        "    run = wandb.init(name='mine')\n"
        "    for step in range(1, 6):\n"
        "        steps(record, step, step)\n"
        "        wait_for(record)\n        time.sleep(0.05)\n"
        "        run.log({'own': step}, step=10 * step)\n"
        "assert wandb.run is run\nrun.log({'own': 6}, step=60)\nrun.finish()\n"
    )
    ended = run(program, "wandb", tmp_path)
    assert "less than" not in ended.output
    (kept,) = runs_of_wandb(tmp_path).values()
    assert kept["name"] == "mine"
    assert [step["own"] for step in kept["steps"].values() if "own" in step] == [1, 2, 3, 4, 5, 6]
    assert [step["loss"] for step in kept["steps"].values() if "loss" in step] == [2.0, 4.0, 6.0, 8.0, 10.0]


@pytest.mark.launches
def test_wandb_without_a_login_says_so_and_the_run_goes_on(tmp_path: Path) -> None:
    if find_spec("wandb") is None and not REQUIRED:
        pytest.skip("wandb is not installed: left out")
    settings = {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    ended = alone(BEGIN + PLAIN % "wandb", tmp_path, **settings)
    assert ended.code == 0, ended.output
    assert ended.output.count("(log in with `wandb login`, or set WANDB_MODE=offline): training goes on") == 1
    assert len(read_records(tmp_path / "run.jsonl").steps) == 5


def run_of_swanlab(folder: Path) -> tuple[dict[int, dict[str, float]], int, str]:
    """Steps, how it ended, and configuration of the only run in a folder."""
    protocol = pytest.importorskip("swanlab.proto.swanlab.record.v1.record_pb2")
    (path,) = folder.glob("swanlog/*/*.swanlab")
    steps: dict[int, dict[str, float]] = {}
    state = -1
    for data in log_records(path):
        record = protocol.Record.FromString(data)
        if record.HasField("scalar"):
            steps.setdefault(record.scalar.step, {})[record.scalar.key] = record.scalar.value.number
        if record.HasField("finish"):
            state = record.finish.state
    return steps, state, (path.parent / "files/config.yaml").read_text()


@pytest.mark.launches
@pytest.mark.parametrize(("n", "end", "state"), [(1, "pass", 1), (1, "raise ValueError('broken')", 2), (2, "pass", 1)])
def test_swanlab(n: int, end: str, state: int, tmp_path: Path) -> None:
    """States of a run: 1 is finished, 2 is crashed."""
    program = BEGIN + PLAIN % "swanlab" + f"    wait_for(record)\n    {end}\n"
    run(program, "swanlab", tmp_path, n=n, code=state - 1)
    steps, ended, config = run_of_swanlab(tmp_path)
    assert list(steps) == [1, 2, 3, 4, 5]
    assert steps[2].items() >= {"grad_norm": 5.0, "clipped": 1.0, "loss": 4.0, "grad_norm/a[*]": 5.0}.items()
    assert ended == state
    assert "optimizer" in config


@pytest.mark.launches
def test_swanlab_s_run_of_the_program_gets_the_numbers_and_goes_on(tmp_path: Path) -> None:
    program = BEGIN + (
        "import swanlab\nrun = swanlab.init(project='mine')\nrecord = dc.Recorder(None, sinks=['swanlab'])\n"
        "steps(record)\nrecord.close()\nassert run.alive\nrun.log({'own': 7}, step=7)\nrun.finish()\n"
    )
    run(program, "swanlab", tmp_path)
    steps, _, _ = run_of_swanlab(tmp_path)
    assert list(steps) == [1, 2, 3, 4, 5, 7]
    assert steps[7] == {"own": 7.0}


MLFLOW_BACK = """
import json, mlflow
client = mlflow.MlflowClient()
kept = {}
for run in client.search_runs(["0"]):
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    steps = {name: [(metric.step, metric.value) for metric in history] for name, history in histories.items()}
    kept[run.info.run_name] = [run.info.status, run.data.params, steps]
print(json.dumps(kept))
"""


def runs_of_mlflow(folder: Path) -> dict[str, Any]:
    """By name: status, parameters, and steps and values of each number."""
    kept: dict[str, Any] = json.loads(run(MLFLOW_BACK, "mlflow", folder).output.splitlines()[-1])
    return kept


@pytest.mark.launches
def test_mlflow(tmp_path: Path) -> None:
    program = (
        BEGIN
        + (PLAIN % "mlflow")
        + (
            "import mlflow\nmlflow.start_run(run_name='mine')\nrecord = dc.Recorder(None, sinks=['mlflow'])\n"
            "steps(record, 7, 9)\nrecord.close()\nassert mlflow.active_run()\nmlflow.log_metric('own', 1.0)\n"
            "mlflow.end_run()\n"
            "from distclip.records.trackers import MLflow\n"
            "with dc.Recorder(None, sinks=[MLflow(run_name='broken')]) as record:\n    steps(record)\n    {}['a']\n"
        )
    )
    run(program, "mlflow", tmp_path, code=1)
    kept = runs_of_mlflow(tmp_path)
    status, params, steps = kept.pop("mine")
    assert (status, params, [step for step, _ in steps["loss"]]) == ("FINISHED", {}, [7, 8, 9])
    assert steps["own"] == [[0, 1.0]]
    status, _, steps = kept.pop("broken")
    assert status == "FAILED"
    ((status, params, steps),) = kept.values()
    assert status == "FINISHED"
    assert params["lr"] == "0.1"
    assert params["optimizer.betas"] == "[0.9, 0.99]"
    assert steps["loss"] == [[step, 2.0 * step] for step in range(1, 6)]
    assert steps["grad_norm/a___"][1] == [2, 5.0]
    assert [step for step, norm in steps["grad_norm"] if math.isnan(norm)] == [3]
