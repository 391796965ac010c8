"""The record of a run: what is written and read back, and what becomes of it when the disk or the job fails."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import alone, on_terminal, under_mpirun

import distclip as dc
from distclip.records import write
from distclip.records.background import LINES
from distclip.records.read import Records, read_records
from distclip.records.sinks import File

BEGIN = """
import os, signal, sys, time
from pathlib import Path
import distclip as dc
import mlx.core as mx

world = dc.init()
clipper = dc.Clipper(1.0, layout=dc.Replicated())

def step(recorder):
    grads, report = clipper({"w": mx.array([3.0, 4.0])})
    mx.eval(grads, report.arrays)
    recorder(report, loss=mx.array(2.0))
"""


def strictly(path: Path) -> list[dict[str, Any]]:
    """The lines of a file by a parser that takes nothing but JSON."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def numbers(step: int, norm: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "norm": norm, "threshold": 1.0} | more


def assert_no_thread() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "distclip-record"]


# ------------------------------------------------------------------------------------- written and read back


def test_the_clippers_report_is_read_back(world: dc.World, tmp_path: Path) -> None:
    path = tmp_path / "new folder/run.jsonl"
    clipper = dc.Clipper(1.0, groups={"a": "a*"}, average=True, rank_batch=4)
    reports = []
    with dc.Recorder(path, config={"rate": 0.1, "never": math.inf, "text": "nan", "odd": object}) as recorder:
        for i in range(6):
            bad = math.nan if i == 3 else math.inf if i == 4 else 1.0
            grads, report = clipper({"a": mx.array([3.0, 4.0]) * (i + 1 + world.rank), "b": mx.array([1.0]) * bad})
            mx.eval(grads, report.arrays)
            reports.append(report.to_dict() | {"loss": 0.5**i})
            recorder(report, loss=mx.array(0.5**i), valid=0.5 if i == 2 else None)
    assert_no_thread()
    if world.rank > 0:
        assert not path.exists()
        return
    header, *lines = strictly(path)
    assert header["kind"] == "distclip-record"
    assert header["ranks"] == world.size
    assert header["config"]["rate"] == 0.1
    assert (header["config"]["never"], header["config"]["text"]) == ("inf", "nan")
    assert len(lines) == 6
    assert lines[3]["norm"] == "nan"
    records = read_records(path)
    assert records.damaged == []
    assert records.dropped == 0
    assert [step["step"] for step in records.steps] == [1, 2, 3, 4, 5, 6]
    for step, expected in zip(records.steps, reports, strict=True):
        hosts = expected.pop("rank_hosts", [])
        assert records.hosts == hosts
        assert step.pop("time") == pytest.approx(time.time(), abs=60)
        assert ("step_s" in step) == (expected["step"] > 1)
        assert 0 < step.pop("step_s", 1) < 60
        assert step.pop("valid", None) == (0.5 if expected["step"] == 3 else None)
        step.pop("rank_hosts", None)
        assert repr(sorted(step.items())) == repr(sorted(expected.items()))  # NaN is NaN here
    assert path.read_text().count("rank_hosts") <= 1, "written once"


def test_a_call_does_not_wait_for_the_step_it_is_given(tmp_path: Path) -> None:
    slow = mx.random.normal((700, 700))
    mx.eval(slow)
    started = time.perf_counter()
    mx.eval(slow @ slow @ slow @ slow)
    takes = time.perf_counter() - started
    with dc.Recorder(tmp_path / "run.jsonl") as recorder:
        recorder(numbers(1))
        loss = (slow @ slow @ slow @ slow).sum()
        started = time.perf_counter()
        recorder(numbers(2), loss=loss)
        assert time.perf_counter() - started < takes / 4
        recorder(numbers(3))
    if dc.init().rank == 0:
        assert read_records(tmp_path / "run.jsonl").steps[1]["loss"] == loss.item()


def test_every_so_many_steps_and_each_bad_one(world: dc.World, tmp_path: Path) -> None:
    with dc.Recorder(tmp_path / "run.jsonl", every=10) as recorder:
        for i in range(1, 36):
            recorder(numbers(i, math.nan if i == 17 else 1.0))
    if world.rank == 0:
        assert [step["step"] for step in read_records(tmp_path / "run.jsonl").steps] == [1, 11, 17, 21, 31]


def test_mistakes_raise_at_the_call(tmp_path: Path) -> None:
    with dc.Recorder(tmp_path / "run.jsonl") as recorder:
        with pytest.raises(TypeError, match="loss should be a number or an array of no dimensions"):
            recorder(numbers(1), loss=mx.zeros(3))
        with pytest.raises(TypeError, match="loss should be a number"):
            recorder(numbers(1), loss="much")
        with pytest.raises(ValueError, match="norm is a name that the record uses itself"):
            recorder(numbers(1), norm=1.0)
        with pytest.raises(TypeError, match="a dict with step and norm"):
            recorder({"step": 1})
    recorder.close()  # again
    with pytest.raises(ValueError, match="is closed"):
        recorder(numbers(1))
    with pytest.raises(ValueError, match="every should be at least 1, 0"):
        dc.Recorder(tmp_path / "run.jsonl", every=0)


def test_a_folder_that_cannot_be_made_raises_at_once(world: dc.World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if world.rank == 0:
        with pytest.raises(OSError, match="file"):
            dc.Recorder(tmp_path / "file/run.jsonl")


def test_a_resumed_run_replaces_what_it_runs_again(world: dc.World, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for first, last, norm in ((1, 10, 1.0), (6, 8, 2.0), (8, 9, 3.0)):
        with dc.Recorder(path) as recorder:
            for i in range(first, last + 1):
                recorder(numbers(0, norm), step=i)
        if world.rank == 0 and last == 10:
            path.write_bytes(path.read_bytes()[:-20])  # killed within a line
    if world.rank == 0:
        records = read_records(path)
        assert [(step["step"], step["norm"]) for step in records.steps] == [
            *((i, 1.0) for i in range(1, 6)),
            *((i, 2.0) for i in (6, 7)),
            *((i, 3.0) for i in (8, 9)),
        ]
        assert len(records.headers) == 3
        assert [number for number, _ in records.damaged] == [11]


# -------------------------------------------------------------------------------------- files that are not whole


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.jsonl"
    lines: list[Any] = [{"kind": "distclip-record", "format": 1, "every": 1}, *(numbers(i) for i in range(1, 6))]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_a_file_that_is_cut_anywhere_is_read_as_far_as_it_goes(whole: Path) -> None:
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(1, len(data) + 1):
        whole.write_bytes(data[:cut])
        lines = sum(end <= cut + 1 for end in ends)  # the last one may lack its end
        if lines == 0:
            with pytest.raises(ValueError, match="is no record of distclip"):
                read_records(whole)
            continue
        records = read_records(whole)
        assert len(records.steps) == lines - 1
        assert len(records.damaged) == (cut not in ends and cut + 1 not in ends)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00garbage",
        b"[1, 2]",
        b"3",
        b'{"step": 2}',
        b'{"step": 2.5, "norm": 1}',
        b'{"step": 2, "norm": "much"}',
        b'{"step": 2, "norm": [1]}',
        b'{"step": 2, "norm": 1' + b"0" * 400 + b"}",
        b'{"step": 2, "norm": 1, "groups": 3}',
        b'{"step": 2, "norm": 1, "groups": {"a": {}}}',
        b'{"step": 2, "norm": 1, "rank_norms": {"a": 1}}',
        b'{"step": 2, "norm": 1, "loss": {"a": 1}}',
        b'{"kind": "else"}',
        b'{"kind": [1]}',
        b"[" * 100_000,
        b"",
    ],
    ids=range(16),
)
def test_a_damaged_line_is_left_out_and_listed(whole: Path, line: bytes) -> None:
    lines = whole.read_bytes().splitlines()
    whole.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n")
    records = read_records(whole)
    assert [step["step"] for step in records.steps] == [1, 2, 3, 4, 5]
    assert [number for number, _ in records.damaged] == [4]


def test_a_file_without_its_header_is_read_when_the_header_is_damaged(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes()[20:])
    records = read_records(whole)
    assert len(records.steps) == 5
    assert records.headers == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n" + bytes(range(256)) * 100, "is no record of distclip"),
        (b"\0" * 2**20, "is no record of distclip"),
        (b"\n" * 1000, "is no record of distclip"),
        (b"some words\n", "is no record of distclip"),
        (b'{"step": 1, "norm": 2.0}\n', "does not begin with a header"),
        (b'{"kind": "distclip-record", "format": 2, "distclip": "9.0"}\n', "written by a newer distclip"),
    ],
)
def test_another_file_gets_a_clear_error(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "file")


# ------------------------------------------------------------------------------------------------ disks that fail


@pytest.mark.launches
def test_a_disk_that_takes_nothing_costs_neither_time_nor_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pipe whose reader reads nothing at first: the steps go on, and what was dropped is counted in the file."""
    path, steps = tmp_path / "pipe", 100_000
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    recorder = dc.Recorder(path)
    tracemalloc.start()
    started = time.perf_counter()
    for i in range(1, steps):
        recorder(numbers(i))
    took = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * LINES
    assert took < 30
    received = bytearray()

    def read() -> None:
        while part := os.read(reader, 2**20):
            received.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    while not recorder._backgrounds[0]._queue.empty():
        time.sleep(0.01)
    recorder(numbers(steps))
    recorder.close()
    thread.join()
    os.close(reader)
    (tmp_path / "read").write_bytes(received)
    records = read_records(tmp_path / "read")
    assert records.damaged == []
    assert len(records.steps) + records.dropped == steps
    assert records.dropped > steps / 2
    assert records.steps[-1]["step"] == steps
    assert capfd.readouterr().err.count("takes lines too slowly") == 1
    assert_no_thread()


@pytest.mark.launches
def test_the_end_of_a_run_waits_for_a_stuck_disk_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write, "CLOSE_S", 0.5)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    recorder = dc.Recorder(tmp_path / "pipe")
    for i in range(1, 5000):
        recorder(numbers(i))
    started = time.perf_counter()
    recorder.close()
    assert time.perf_counter() - started < 3
    assert "did not take the last lines within 0.5 s" in capfd.readouterr().err
    os.close(reader)  # ends the writing thread
    recorder._backgrounds[0]._thread.join(5)
    assert_no_thread()


@pytest.mark.launches
def test_a_full_disk_does_not_end_the_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if os.getuid() != 0 or sys.platform != "linux":
        pytest.skip("only root on Linux can make a small file system: a full disk is left out")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True, text=True, timeout=10
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({mounted.stderr.strip()}): a full disk is left out")
    try:
        (tmp_path / "other").write_bytes(bytes(200_000))
        recorder = dc.Recorder(tmp_path / "run.jsonl")
        for i in range(1, 3001):
            recorder(numbers(i))
            if i % 500 == 0:
                time.sleep(0.1)  # the thread keeps up: what is dropped is dropped for want of room
            if i == 2000:
                (tmp_path / "other").unlink()
        recorder.close()
        records = read_records(tmp_path / "run.jsonl")
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=10)
    assert records.dropped > 500
    assert len(records.steps) + records.dropped == 3000
    assert len(records.damaged) <= 1
    assert records.steps[-1]["step"] == 3000
    assert len(records.headers) == 1
    assert capfd.readouterr().err.count("No space left on device") == 1


def test_a_line_that_lacks_nothing_but_its_end_is_not_counted_as_lost(tmp_path: Path) -> None:
    file = File(tmp_path / "run.jsonl", {"kind": "distclip-record", "format": 1})
    file.write(numbers(1))
    room, hard = (tmp_path / "run.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room + len(json.dumps(numbers(2), separators=(",", ":"))), hard))
        file.write(numbers(2))
        with pytest.raises(OSError, match="File too large"):
            file.write(numbers(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file.write(numbers(4))
    file.close("finished")
    records = read_records(tmp_path / "run.jsonl")
    assert [step["step"] for step in records.steps] == [1, 2, 4]
    assert records.damaged == []


# --------------------------------------------------------------------------------------------- jobs that fail


@pytest.mark.launches
@pytest.mark.parametrize(
    ("n", "end"),
    [
        *((n, end) for n in (1, 2) for end in ("raise ValueError('broken')", "sys.exit(3)", "sys.exit()")),
        (2, "raise KeyboardInterrupt"),
        (2, "recorder.close()"),
        (3, "raise ValueError('broken')"),
        (3, "recorder.close()"),
    ],
)
def test_every_step_is_there_however_rank_0_ends(n: int, end: str, tmp_path: Path) -> None:
    good = end in ("sys.exit()", "recorder.close()")
    program = BEGIN + "recorder = dc.Recorder('run.jsonl')\nfor i in range(9):\n    step(recorder)\n"
    if not good:  # the ranks share no collective, and one that fails first ends the job while rank 0 is behind
        program += "if world.rank > 0:\n    time.sleep(60)\n"
    program += f"{end}\n"
    ended = alone(program, tmp_path) if n == 1 else under_mpirun(n, program, tmp_path)
    assert (ended.code == 0) == good, ended.output
    assert_steps(read_records(tmp_path / "run.jsonl"), 9)


@pytest.mark.launches
def test_an_exception_within_the_with_block_loses_no_step(tmp_path: Path) -> None:
    program = (
        "with dc.Recorder('run.jsonl') as recorder:\n    for i in range(9):\n        step(recorder)\n    {}['a']\n"
    )
    ended = under_mpirun(2, BEGIN + program, tmp_path)
    assert "KeyError: 'a'" in ended.output
    assert_steps(read_records(tmp_path / "run.jsonl"), 9)


@pytest.mark.launches
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("end", ["raise ValueError('broken')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_end_of_another_rank_costs_the_last_step_at_most(n: int, end: str, tmp_path: Path) -> None:
    program = BEGIN + (
        "recorder = dc.Recorder('run.jsonl')\nfor i in range(9):\n    step(recorder)\n"
        "mx.eval(mx.distributed.all_sum(mx.ones(1), group=world.group))\ntime.sleep(0.2)\n"
        f"if world.rank == 1:\n    {end}\ntime.sleep(10)\n"
    )
    ended = under_mpirun(n, program, tmp_path)
    assert ended.code != 0
    assert_steps(read_records(tmp_path / "run.jsonl"), 8)


@pytest.mark.launches
def test_a_job_that_is_asked_to_end_has_written_all_but_the_last_step(tmp_path: Path) -> None:
    program = "recorder = dc.Recorder('run.jsonl')\nfor i in range(9):\n    step(recorder)\n"
    program += "time.sleep(0.3)\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)\n"
    assert alone(BEGIN + program, tmp_path).code == -signal.SIGTERM
    assert_steps(read_records(tmp_path / "run.jsonl"), 8)


@pytest.mark.launches
@pytest.mark.parametrize(
    "recording", ["recorder = dc.Recorder('run.jsonl')\nif True:", "with dc.Recorder('run.jsonl') as recorder:"]
)
def test_a_failed_rank_does_not_wait_for_a_sum_that_others_never_join(recording: str, tmp_path: Path) -> None:
    program = BEGIN + (
        f"{recording}\n    for i in range(9):\n        step(recorder)\n"
        "    if world.rank == 0:\n"
        "        late = mx.distributed.all_sum(mx.ones(()), group=world.group)\n"
        "        recorder({'step': 10, 'norm': late})\n"
        "        Path('leaving').write_text(str(time.time()))\n"
        "        raise ValueError('broken')\n"
        "    time.sleep(30)\n"
    )
    ended = under_mpirun(2, program, tmp_path)
    assert ended.code != 0
    assert "ValueError: broken" in ended.output
    assert ended.at - float((tmp_path / "leaving").read_text()) < 5
    assert_steps(read_records(tmp_path / "run.jsonl"), 9)


@pytest.mark.launches
def test_lazy_sums_of_the_ranks_are_joined_by_all(tmp_path: Path) -> None:
    """The recorder alone evaluates here, and so on every rank, in the same order as the steps."""
    program = BEGIN + (
        "with dc.Recorder('run.jsonl') as recorder:\n    for i in range(20):\n"
        "        loss = mx.distributed.all_sum(mx.array(float(i)), group=world.group)\n"
        "        recorder({'step': i, 'norm': loss * 2, 'threshold': 1.0}, loss=loss)\n"
    )
    ended = under_mpirun(3, program, tmp_path)
    assert ended.code == 0, ended.output
    assert [step["loss"] for step in read_records(tmp_path / "run.jsonl").steps] == [3.0 * i for i in range(20)]


@pytest.mark.launches
def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    program = BEGIN + (
        "import warnings\nwarnings.simplefilter('ignore')\nrecorder = dc.Recorder('run.jsonl')\nstep(recorder)\n"
        "if os.fork() == 0:\n    recorder({'step': 7, 'norm': 1.0})\n    recorder.close()\n    os._exit(0)\n"
        "os.wait()\nstep(recorder)\nrecorder.close()\n"
    )
    ended = alone(program, tmp_path)
    assert ended.code == 0, ended.output
    assert_steps(read_records(tmp_path / "run.jsonl"), 2)


def assert_steps(records: Records, last: int) -> None:
    assert [step["step"] for step in records.steps] == list(range(1, last + 1))
    assert records.damaged == []
    assert all(step["loss"] == 2.0 and step["norm"] == 5.0 for step in records.steps)


# --------------------------------------------------------------------------------------- what is seen meanwhile


@pytest.mark.launches
def test_one_rank_shows_a_line_every_so_many_steps(tmp_path: Path) -> None:
    program = BEGIN + (
        "with dc.Recorder('run.jsonl', live=True, live_every=4) as recorder:\n    for i in range(10):\n"
        "        step(recorder)\n"
    )
    ended = under_mpirun(2, program, tmp_path, NO_COLOR="1")
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 5", "step 9", "step 10"], ended.output
    assert lines[-1].startswith("step 10  loss 2  norm 5  threshold 1  clipped 100%  skipped 0  ")
    assert lines[-1].endswith(" ms")


@pytest.mark.launches
def test_a_terminal_has_one_line_that_changes(tmp_path: Path) -> None:
    program = BEGIN + (
        "with dc.Recorder('run.jsonl', live=True) as recorder:\n    for i in range(10):\n"
        "        step(recorder)\n        time.sleep(0.12)\n"
    )
    (tmp_path / "program.py").write_text(program)
    shown = on_terminal([sys.executable, "program.py"], tmp_path)
    assert shown.count(b"\n") == 1
    assert shown.count(b"\rstep ") >= 9
    assert shown.rpartition(b"\rstep ")[2].startswith(b"10  loss 2  norm 5")


@pytest.mark.launches
def test_the_line_is_shown_by_rank_0_without_a_file(tmp_path: Path) -> None:
    program = BEGIN + (
        "with dc.Recorder(None, live=True, steps=20) as recorder:\n    for i in range(20):\n"
        "        _, report = clipper({'w': mx.array([3.0, 4.0])})\n        mx.eval(report.arrays)\n"
        "        recorder(report, loss=mx.distributed.all_sum(mx.array(1.0)), **{'tokens/s': 12345.6})\n"
    )
    ended = under_mpirun(2, program, tmp_path)
    assert ended.code == 0, ended.output
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    assert [line.split("  ")[0] for line in lines] == ["step 1/20", "step 11/20", "step 20/20"], ended.output
    assert lines[-1].startswith("step 20/20  loss 2  tokens/s 12,346  norm 5  threshold 1  clipped 100%  skipped 0  ")
    assert list(tmp_path.iterdir()) == [tmp_path / "program.py"]


def test_without_a_file_no_thread_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with dc.Recorder(None) as recorder:
        assert_no_thread()
        recorder(numbers(1), loss=mx.array(2.0))
        recorder(numbers(2))
    with pytest.raises(ValueError, match="is closed"):
        recorder(numbers(3))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="steps should be at least 1, 0 was provided"):
        dc.Recorder(None, steps=0)


@pytest.mark.launches
def test_a_terminal_has_a_bar_that_grows(tmp_path: Path) -> None:
    program = BEGIN + (
        "with dc.Recorder(None, live=True, steps=10) as recorder:\n    for i in range(10):\n"
        "        step(recorder)\n        time.sleep(0.12)\n"
    )
    (tmp_path / "program.py").write_text(program)
    shown = on_terminal([sys.executable, "program.py"], tmp_path)
    assert shown.count(b"\n") == 1
    assert b"\r[####      ] step 4/10  loss 2  norm 5" in shown
    assert shown.rpartition(b"\r[")[2].startswith(b"##########] step 10/10  loss 2  norm 5")
