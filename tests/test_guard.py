"""What a rank started ends with it, however it ends; and a rank that does not call init() is named, in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import MPIRUN, SHARE_CORES, Ended, environment, launch, over_ring, under_mpirun, wait_for_end

from distclip.guard import NOTICED_S
from distclip.world import _seconds

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[1]
SOON_S = 8
BEGIN = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
import distclip as dc
import mlx.core as mx

def step():
    mx.eval(mx.distributed.all_sum(mx.ones(3), group=dc.init().group))

def work(name, queue):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a worker with a handler of its own
    Path(name).write_text(str(os.getpid()))
    queue.get()
"""
WORKERS = """
if __name__ == "__main__":
    world = dc.init()
    context = multiprocessing.get_context({method!r})
    queue = context.SimpleQueue()
    for number in range(2):
        name = f"worker-{{world.rank}}-{{number}}"
        context.Process(target=work, args=(name, queue), daemon=True).start()
        while not (Path(name).exists() and Path(name).read_text()):
            time.sleep(0.01)
    step()
    if world.rank == 1:
        Path("leaving").write_text(str(time.time()))
        {leave}
    with dc.Watchdog(1):
        step()
"""
ENDS = {
    "an exception": "raise ValueError('broken data')",
    "kill -9": "os.kill(os.getpid(), signal.SIGKILL)",
    "a watchdog": "\n        with dc.Watchdog(1):\n            time.sleep(1000)",
    "os._exit": "os._exit(3)",
}


def launcher(how: str, ranks: int, script: str) -> tuple[list[str], dict[str, str]]:
    if how == "mpirun":
        return [str(MPIRUN), "-n", str(ranks), *SHARE_CORES, sys.executable, script], {}
    if how == "local.sh":
        return [str(ROOT / "launch/local.sh"), script], {"NP": str(ranks)}
    command = [sys.executable, "-m", "distclip", "launch", "--hosts", f"localhost:{ranks}", script]
    return command, {"MPIRUN_ARGS": " ".join(SHARE_CORES[4:])}


def run(how: str, ranks: int, program: str, folder: Path, **variables: str) -> Ended:
    (folder / "program.py").write_text(BEGIN + textwrap.dedent(program))
    command, more = launcher(how, ranks, "program.py")
    return launch(command, folder, more | variables)


def assert_workers_ended(ended: Ended, folder: Path, count: int) -> None:
    assert ended.code != 0, ended.output
    assert ended.at - float((folder / "leaving").read_text()) < SOON_S, ended.output
    workers = [int(file.read_text()) for file in folder.glob("worker-*")]
    assert len(workers) == count
    assert wait_for_end(workers, 3) == []


# ------------------------------------------------------------------------------------------- what a rank started


@pytest.mark.parametrize("how", ["mpirun", "local.sh", "launch"])
@pytest.mark.parametrize(("end", "method"), [*((end, "fork") for end in ENDS), ("kill -9", "spawn")])
def test_workers_of_a_loader_end_with_their_rank(end: str, method: str, how: str, tmp_path: Path) -> None:
    program = WORKERS.format(method=method, leave=ENDS[end])
    ended = run(how, 2, program, tmp_path)
    assert_workers_ended(ended, tmp_path, 4)


@pytest.mark.parametrize("how", ["mpirun", "launch"])
def test_an_exit_with_an_error_ends_the_workers(how: str, tmp_path: Path) -> None:
    """Python itself ends those that do not ignore SIGTERM, and waits for the others."""
    program = WORKERS.format(method="fork", leave="sys.exit(3)")
    program = BEGIN.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "pass") + textwrap.dedent(program)
    ended = run(how, 3, program, tmp_path)
    assert_workers_ended(ended, tmp_path, 6)


def test_the_launcher_ends_what_is_left_of_a_rank_that_never_joined(tmp_path: Path) -> None:
    program = """
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        child = subprocess.Popen(["sleep", "100"])
        Path("child").write_text(str(child.pid))
        os._exit(3)
    time.sleep(100)
    """
    ended = run("launch", 2, program, tmp_path)
    assert ended.code == 3, ended.output
    assert wait_for_end([int((tmp_path / "child").read_text())], 3) == []


@pytest.mark.parametrize("how", ["mpirun", "launch"])
@pytest.mark.parametrize("case", ["a session of its own, after an exception", "the same group, after a good end"])
def test_what_is_to_go_on_goes_on(case: str, how: str, tmp_path: Path) -> None:
    own = case.startswith("a session")
    program = f"""
    world = dc.init()
    if world.rank == 1:
        nothing = subprocess.DEVNULL
        server = ["sleep", "60"]
        child = subprocess.Popen(server, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session={own})
        Path("child").write_text(str(child.pid))
        child.returncode = 0  # no warning
    step()
    if {own} and world.rank == 1:
        raise ValueError
    """
    (tmp_path / "program.py").write_text(BEGIN + textwrap.dedent(program))
    command, variables = launcher(how, 2, "program.py")
    ended = subprocess.run(command, cwd=tmp_path, env=environment() | variables, capture_output=True, timeout=60)
    child = int((tmp_path / "child").read_text())
    try:
        assert (ended.returncode != 0) == own, ended
        assert wait_for_end([child], 2.5) == [child]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_rank_can_wait_for_all_its_children(tmp_path: Path) -> None:
    program = """
    dc.init()
    child = os.fork()
    if child == 0:
        os._exit(5)
    assert os.wait()[0] == child
    try:
        os.wait()
    except ChildProcessError:
        step()
        print("no other child", flush=True)
    """
    ended = run("mpirun", 2, program, tmp_path)
    assert ended.code == 0, ended.output
    assert ended.output.count("no other child") == 2


def test_a_shell_that_started_a_rank_goes_on_after_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(BEGIN + "dc.init()\nstep()\nos._exit(3)\n")
    script = f"{sys.executable} program.py; sleep 2; touch went-on-$OMPI_COMM_WORLD_RANK; exit 0"
    launch([str(MPIRUN), "-n", "2", *SHARE_CORES, "sh", "-c", script], tmp_path)
    assert {file.name for file in tmp_path.glob("went-on-*")} == {"went-on-0", "went-on-1"}


# ------------------------------------------------------------------------------------------------------- joining

MISSING = {
    "sleeps": "time.sleep(1000)",
    "has ended well": "sys.exit(0)",
    "has failed": "raise ValueError('broken data')",
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("missing", MISSING)
def test_a_rank_that_does_not_join_is_named(missing: str, ranks: int, tmp_path: Path) -> None:
    program = f"""
    import distclip.guard
    distclip.guard.NOTICE_S = 1
    Path("leaving").write_text(str(time.time()))
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        {MISSING[missing]}
    dc.init(timeout=2)
    print("never here", flush=True)
    """
    ended = run("mpirun", ranks, program, tmp_path)
    assert ended.code != 0, ended.output
    assert "never here" not in ended.output
    if missing == "has failed":  # Open MPI ends the job at once, or hangs until its guard ends it
        assert "ValueError: broken data" in ended.output
        assert ended.at - float((tmp_path / "leaving").read_text()) < NOTICED_S + SOON_S, ended.output
        return
    assert ended.at - float((tmp_path / "leaving").read_text()) < 2 + SOON_S, ended.output
    if "prterun has exited due to process rank 1" in ended.output:  # Open MPI noticed first, as it may
        return
    who = rf"distclip: rank [02] of {ranks} on \S+ has waited"  # one of those that wait may end the job first
    assert re.search(rf"{who} 1 s in init\(\) for rank 1, which did not call it\.", ended.output), ended.output
    last = (
        rf"distclip: rank \d of {ranks} on \S+ has waited 2 s in init\(\) for rank 1, which did not call it; the whole"
    )
    assert re.search(last, ended.output), ended.output


def test_the_launcher_names_a_rank_that_ended_before_it_joined(tmp_path: Path) -> None:
    program = """
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        sys.exit(0)
    dc.init()
    """
    (tmp_path / "program.py").write_text(BEGIN + textwrap.dedent(program))
    driver = """
    import sys
    from distclip import cli
    from distclip.cluster import launch

    launch.FAIL_S = 1.0
    sys.exit(cli.main(["launch", "--hosts", "localhost:3", "program.py"]))
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))
    ended = launch([sys.executable, "driver.py"], tmp_path, {"MPIRUN_ARGS": " ".join(SHARE_CORES[4:])})
    assert ended.code != 0
    assert re.search(r"rank 1 on \S+ did not call init\(\), and ranks 0, 2 waited there", ended.output), ended.output


def test_a_rank_that_is_late_is_waited_for(tmp_path: Path) -> None:
    """By a variable, and without a limit."""
    program = """
    import distclip.guard
    distclip.guard.NOTICE_S = 3
    time.sleep(6 * (os.environ["OMPI_COMM_WORLD_RANK"] == "1"))
    dc.init()
    time.sleep(0.5)
    step()
    """
    for limit in ("20", "0"):
        ended = run("mpirun", 2, program, tmp_path, DISTCLIP_INIT_TIMEOUT=limit)
        assert ended.code == 0, ended.output
        assert ended.output.count("has waited") == 1, ended.output


def test_a_rank_that_does_not_join_the_ring(tmp_path: Path) -> None:
    program = """
    if os.environ["MLX_RANK"] == "1":
        time.sleep(1000)
    dc.init(timeout=2)
    print("never here", flush=True)
    """
    ended = over_ring(2, BEGIN + textwrap.dedent(program), tmp_path)
    assert "rank 0 of 2 on" in ended.output
    assert "has waited 2 s in init() for the other ranks; the whole job ends" in ended.output
    assert "never here" not in ended.output


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "soon"])
def test_a_bad_timeout_is_named(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"timeout should be seconds, 0 or more \(0: no limit\)"):
        _seconds(timeout)
    monkeypatch.setenv("DISTCLIP_INIT_TIMEOUT", str(timeout))
    with pytest.raises(ValueError, match=r"DISTCLIP_INIT_TIMEOUT should be seconds"):
        _seconds(None)


def test_a_machine_on_which_nothing_can_be_started(tmp_path: Path) -> None:
    ended = under_mpirun(2, BEGIN + "sys.executable = '/nowhere'\ndc.init()\nstep()\n", tmp_path)
    assert (ended.code, ended.output) == (0, "")
