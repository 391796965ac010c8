"""Start programs for a test: a clean environment, a time limit, and no processes left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.prefix) / "bin"
MPIRUN = BIN / "mpirun"
# Ranks share the cores: they are not pinned, and sleep while they wait for each other.
SHARE_CORES = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
SHARE_CORES += ["--mca", "threads_pthreads_yield_strategy", "nanosleep"]
LIMIT_S = 100  # against hangs; on a busy machine programs took up to 60
GRACE_S = 3  # after the job: what a rank started ends 1 s after its rank
LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "OPAL_", "MLX_", "SLURM_", "HWLOC_")


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    output: str  # standard output and error of all ranks
    at: float  # time.time()


def alone(program: str, folder: Path, **variables: str) -> Ended:
    """Run a program with plain ``python``."""
    return launch([sys.executable, _script(program, folder)], folder, variables)


def under_mpirun(n: int, program: str, folder: Path, *, mpirun: Path = MPIRUN, **variables: str) -> Ended:
    """Run a program with n ranks under Open MPI's mpirun."""
    command = [str(mpirun), "-n", str(n), *SHARE_CORES, sys.executable, _script(program, folder)]
    return launch(command, folder, variables)


def over_ring(n: int, program: str, folder: Path) -> Ended:
    """Run a program with n ranks over MLX's ring. The exit code is mlx.launch's, which is 0 whatever the ranks' are."""
    port = str(20_000 + os.getpid() % 1000 * 8)  # other tests may run at the same time
    command = [str(BIN / "mlx.launch"), "-n", str(n), "--starting-port", port, "--python", sys.executable, "--"]
    return launch(
        [*command, _script(program, folder)], folder, {"TMPDIR": str(folder)}
    )  # mlx.launch leaves files there


def launch(
    command: list[str], folder: Path, variables: dict[str, str] | None = None, *, limit_s: float = LIMIT_S
) -> Ended:
    """Run a command in a folder. The test fails if it takes longer than the limit or leaves processes behind."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment() | (variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
        finally:
            code, at = process.returncode, time.time()
            left = _end_session(process.pid, grace_s=0 if code is None else GRACE_S)
            process.wait()
        output.seek(0)
        text = output.read()
    if code is None:
        pytest.fail(f"{' '.join(command)} took longer than {limit_s} s and was ended:\n{text}")
    assert not left, f"{' '.join(command)} ended and left processes {left} behind:\n{text}"
    return Ended(code, text, at)


def on_terminal(command: list[str], folder: Path, limit_s: float = LIMIT_S) -> bytes:
    """Run a command on a terminal, and return its output; it must end with exit code 0."""
    ours, theirs = pty.openpty()
    env = environment() | {"DISTCLIP_TERMINAL": "1"}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux raises it when the other end closes
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(limit_s) == 0
    return shown


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pids: list[int], limit_s: float, runs: Callable[[int], bool] = is_running) -> list[int]:
    """The processes that still run after the limit."""
    until = time.monotonic() + limit_s
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _script(program: str, folder: Path) -> str:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    return str(path)


def environment() -> dict[str, str]:
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PYTHONUNBUFFERED")  # the last mixes lines of several ranks
    env = {name: text for name, text in os.environ.items() if not name.startswith(LAUNCHERS) and name not in names}
    if os.getuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _end_session(session: int, grace_s: float) -> list[int]:
    """End every process of a session that still runs after the grace period, and return them.

    mpirun gives each rank a process group, so a signal to the launcher's group would miss them.
    """
    deadline = time.monotonic() + grace_s
    while (left := running_in(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def running_in(session: int) -> list[int]:
    """The processes of a session."""
    running = []
    for pid, state in _processes():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if not state.startswith("Z") and os.getsid(pid) == session:
                running.append(pid)
    return running


def _processes() -> Iterator[tuple[int, str]]:
    proc = Path("/proc")
    if (proc / "self/stat").exists():  # a small Linux may have no ps
        for folder in proc.glob("[0-9]*"):
            with contextlib.suppress(OSError):
                yield int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()[0]
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, timeout=10)
        yield from ((int(pid), state) for pid, state in (line.split() for line in listing.stdout.splitlines()))
