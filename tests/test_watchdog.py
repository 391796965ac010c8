"""The watchdog ends a job whose rank stops, exits or holds the interpreter; it leaves a good run alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from launching import Ended, alone, over_ring, under_mpirun

import distclip as dc

pytestmark = pytest.mark.launches

SOON_S = 6  # beyond the watchdog's time: 2 s for all to speak, the end of mpirun, and a busy machine

BEGIN = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
import distclip as dc
import mlx.core as mx

world = dc.init()

def step():
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=world.group))

def leaving():
    Path("leaving").write_text(str(time.time()))

def stop(seconds):
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)

def forked():
    child = os.fork()
    if child == 0:
        time.sleep(2.5)
        sys.exit(5)
    return child
"""
LAST_OF_ALL = """
import atexit, os, threading
atexit.register(lambda: any(thread.name == "distclip-watchdog" for thread in threading.enumerate()) and os._exit(7))
"""
GOOD = {
    "context": """
        with dc.Watchdog(timeout=30) as watchdog:
            for _ in range(5):
                step()
                watchdog()
    """,
    "callback": """
        watchdog = dc.Watchdog(30)
        for _ in range(5):
            step()
            watchdog({"loss": 1.0}, anything=2)
    """,
}


def program(text: str) -> str:
    lines = text.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return BEGIN + "\n".join(line[indent:] for line in lines) + "\n"


def reports_of(ended: Ended, timeout: float) -> dict[int, tuple[str, str]]:
    """The reports of the watchdogs by rank: the last step, and the stack of the main thread."""
    reports = re.findall(
        rf"^distclip: rank (\d+) of \d+ on \S+: no step has ended for {timeout:g} s; (.*)\. "
        r"The stacks of its threads:\nMainThread \(most recent call first\):\n((?:  File .*\n)+)",
        ended.output.replace("\r", ""),
        re.MULTILINE,
    )
    return {int(rank): (last, stack) for rank, last, stack in reports}


def assert_ended(ended: Ended, folder: Path, timeout: float) -> None:
    assert ended.code != 0, ended.output
    assert "the whole job ends" in ended.output
    assert ended.at - float((folder / "leaving").read_text()) < timeout + SOON_S, ended.output


# ------------------------------------------------------------------------------------------------ it ends the job


def test_a_rank_that_is_stopped_ends_the_job(tmp_path: Path) -> None:
    text = """
        with dc.Watchdog(timeout=2) as watchdog:
            for _ in range(3):
                step()
                watchdog()
            if world.rank == 1:
                leaving()
                os.kill(os.getpid(), signal.SIGSTOP)
            step()  # mpirun has rank 1 go on before it ends it, so this may return on any rank
    """
    ended = under_mpirun(3, program(text), tmp_path)
    assert_ended(ended, tmp_path, 2)
    reports = reports_of(ended, 2)
    assert reports.keys() == {0, 2}, ended.output
    for last, stack in reports.values():
        assert last == "the last was step 3"
        assert re.match(r'  File ".*program.py", line \d+ in step\n  File ".*program.py", line \d+ in <module>', stack)


def test_ranks_that_ended_well_or_hold_the_interpreter_end_the_job(tmp_path: Path) -> None:
    """Rank 1 has ended with exit code 0, and no thread of rank 2 can run: it is for rank 0 to end the job."""
    text = """
        watchdog = dc.Watchdog(timeout=1)
        step()
        watchdog(step=7)
        if world.rank == 1:
            leaving()
            sys.exit(0)
        if world.rank == 2:
            ctypes.PyDLL(None).sleep(1000)
        step()
        print("never here", flush=True)
    """
    ended = under_mpirun(3, program(text), tmp_path)
    assert_ended(ended, tmp_path, 1)
    assert {rank: last for rank, (last, _) in reports_of(ended, 1).items()} == {0: "the last was step 7"}, ended.output
    assert "never here" not in ended.output


def test_a_loader_that_hangs_ends_a_process_alone(tmp_path: Path) -> None:
    text = """
        def load():
            time.sleep(1000)

        print("what was printed is kept")
        with dc.Watchdog(timeout=0.5):
            leaving()
            load()
    """
    ended = alone(program(text), tmp_path)
    assert_ended(ended, tmp_path, 0.5)
    assert ended.code == 1
    last, stack = reports_of(ended, 0.5)[0]
    assert last == "it is the first"
    assert "in load\n" in stack
    assert "what was printed is kept" in ended.output


def test_a_rank_that_hangs_ends_the_ring(tmp_path: Path) -> None:
    text = """
        with dc.Watchdog(timeout=1) as watchdog:
            step()
            watchdog()
            if world.rank == 1:
                leaving()
                time.sleep(1000)
            step()
            print("never here", flush=True)
    """
    ended = over_ring(2, program(text), tmp_path)
    assert "never here" not in ended.output
    assert reports_of(ended, 1).keys() == {0, 1}, ended.output
    assert ended.at - float((tmp_path / "leaving").read_text()) < 1 + SOON_S, ended.output


def test_an_exception_ends_the_job_as_without_it(tmp_path: Path) -> None:
    text = """
        with dc.Watchdog(timeout=60) as watchdog:
            step()
            watchdog()
            if world.rank == 1:
                leaving()
                raise ValueError("broken data")
            step()
            print("never here", flush=True)
    """
    ended = under_mpirun(2, program(text), tmp_path)
    assert_ended(ended, tmp_path, 0)
    assert "never here" not in ended.output
    assert "ValueError: broken data" in ended.output
    assert "no step has ended" not in ended.output


# --------------------------------------------------------------------------------------------- it leaves it alone


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("form", GOOD)
def test_a_good_run_ends_well(form: str, n: int, tmp_path: Path) -> None:
    """A thread that is alive when Python ends can spoil the exit code: here it does so each time."""
    text = LAST_OF_ALL + program(GOOD[form])
    ended = under_mpirun(n, text, tmp_path) if n > 1 else alone(text, tmp_path)
    assert (ended.code, ended.output) == (0, "")


def test_a_step_that_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    """Slow steps, a stopped process that goes on, a forked child, and an end before the time is up."""
    text = """
        with dc.Watchdog(timeout=1) as watchdog:
            child = forked()
            for _ in range(2):
                time.sleep(0.5)
                watchdog()
            stop(2.5)
            time.sleep(0.5)
            watchdog()
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        time.sleep(1.5)
    """
    ended = alone(program(text), tmp_path)
    assert (ended.code, ended.output) == (0, "")


def test_a_rank_that_goes_on_before_the_others_leave_saves_the_job(tmp_path: Path) -> None:
    text = """
        import distclip.watchdog

        distclip.watchdog.GRACE_S = 30  # a busy machine wakes rank 1 late
        with dc.Watchdog(timeout=1) as watchdog:
            step()
            watchdog()
            if world.rank == 1:
                stop(2)
            step()
            watchdog()
            time.sleep(0.5)
    """
    ended = under_mpirun(2, program(text), tmp_path)
    assert ended.code == 0, ended.output
    assert reports_of(ended, 1).keys() == {0}, ended.output
    assert re.search(r"distclip: rank 0 of 2 on \S+: step 2 has ended after all; the job goes on\.", ended.output)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, None, "60"])
def test_a_bad_timeout_is_named(timeout: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"timeout should be seconds, > 0 and finite, {timeout!r} was")):
        dc.Watchdog(timeout)


def test_a_closed_watchdog_raises() -> None:
    watchdog = dc.Watchdog(60)
    watchdog()
    watchdog.close()
    watchdog.close()
    with pytest.raises(ValueError, match="is closed"):
        watchdog()
    with pytest.raises(ValueError, match="is closed"), watchdog:
        pass
