"""Run a script on several hosts: check the hosts, start one mpirun, and watch it to its end.

    distclip launch --hostfile hosts.json train.py --steps 500              check the hosts, run, watch
    distclip launch --hostfile hosts.json --dry-run train.py --steps 500    print the mpirun line, start nothing

The exit code is 0 only when every rank has finished: mpirun itself can return 0 after it has lost a host. Every line of
output begins with its rank. A job that cannot go on ends within half a minute; a job that hangs ends after the timeout
of its dc.Watchdog. A message then names the rank or the host. A Mac stays awake while its ranks run. Options of Python
follow two dashes: ``-- -m my_package.train``.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import math
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from distclip.cluster.agent import last_line
from distclip.cluster.doctor import preflight
from distclip.cluster.hosts import Job, add_host_arguments, job_of
from distclip.cluster.mpirun import is_here, mpirun_line, ranks_by_host, ssh_line
from distclip.cluster.output import HOLD_S, Line, Output, Screen
from distclip.cluster.ranks import Ranks
from distclip.cluster.remote import run_bounded
from distclip.guard import listed
from distclip.marks import ENABLED, MARK

START_S = 30.0  # timeout for the start of every rank
FAIL_S = 15.0  # timeout for the end of mpirun after a rank has failed
FINISH_S = 30.0  # timeout for the end of mpirun after every rank has finished
STOP_S = 10.0  # timeout for the end of mpirun after SIGTERM
RETURN_S = 600.0  # timeout for hosts to come back before a restart
RETRY_S = 5.0  # between two checks whether they are back
SSH_S = 8.0  # timeout for a host to answer ssh

# Keeps a Mac awake until the rank, which takes the shell's place, has ended; other systems have no caffeinate. The
# parentheses: it must not become a child of the rank. Without an output: mpirun waits until nobody holds the rank's.
AWAKE = 'if command -v caffeinate; then (caffeinate -i -s -w $$ &); fi </dev/null >/dev/null 2>&1; exec "$@"'
# Starts each rank, and marks on which host, and how the rank ended, kill -9 included. After a failure it ends what the
# rank has started and left, which is the process group that mpirun made for this shell.
WRAPPER = f"""printf '{MARK} %s started %s\\n' "$OMPI_COMM_WORLD_RANK" "$(uname -n)" >&2; "$@"; code=$?
printf '{MARK} %s ended %s\\n' "$OMPI_COMM_WORLD_RANK" "$code" >&2
if [ "$code" != 0 ]; then (sleep 1; kill -s KILL -- "-$$") </dev/null >/dev/null 2>&1 & fi; exit "$code\""""
BAD_OPTION = 2  # the exit code of argparse
QUEUED = 64  # blocks that wait for the screen: a slow one holds back the ranks, and no memory fills

SCREEN = Screen()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``distclip launch``."""
    add_host_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the mpirun line, start nothing")
    restarts = "start again up to N times after a failure, with --resume"
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help=restarts)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="the script and its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the script, or print the mpirun line for it; return the exit code."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        job = job_of(args)
        if not command:
            raise ValueError("name the script to run, after the options")
        if args.restarts < 0:
            raise ValueError(f"--restarts {args.restarts}: give 0 or more")
    except ValueError as error:
        args.error(str(error))
    if args.dry_run:
        SCREEN.show(Line(""), sys.stdout, shlex.join(mpirun_line(job, _rank_command(job, command))), ends=True)
        return 0
    with _stoppable():
        return _attempts(job, command, args.restarts)


def _rank_command(job: Job, command: list[str]) -> list[str]:
    """The words that run a rank, and keep its host awake."""
    return ["/bin/sh", "-c", AWAKE, "sh", job.python, *command]


def _attempts(job: Job, command: list[str], restarts: int) -> int:
    """Run the job, and again after a failure; return the last exit code."""
    if not _ready(job, command, timeout_s=0):
        return 1
    for left in range(restarts, -1, -1):
        attempt = Attempt(job)
        code = attempt.run(command)
        if code == 0 or not left or len(attempt.ranks.started) < job.ranks:  # what did not start would fail again
            break
        if BAD_OPTION in attempt.ranks.ended.values():
            SCREEN.say(f"not started again: exit code {BAD_OPTION} says that the script does not know an option")
            break
        if "--resume" not in command:
            command = [*command, "--resume"]
        SCREEN.say(f"starting again with --resume; attempts left: {left}")
        if not _ready(job, command, RETURN_S):
            break
    return code


def _ready(job: Job, command: list[str], timeout_s: float) -> bool:
    """Check the hosts until all checks pass; print the failures after the timeout."""
    files = [] if command[0].startswith("-") else list(map(str, script_files(Path(job.cwd, command[0]))))
    deadline = time.monotonic() + timeout_s
    while failures := [finding for finding in preflight(job, files) if not finding.ok]:
        if time.monotonic() >= deadline:
            for failure in failures:
                SCREEN.say(f"{failure.host}: {failure.check}: {failure.message} -> {failure.remedy}")
            return False
        time.sleep(RETRY_S)
    return True


def script_files(script: Path) -> list[Path]:
    """The script, and the Python files beside it that it imports, also by way of each other."""
    files = [script]
    for file in files:  # those that are added, too
        for name in _imported_names(file):
            beside = [script.parent / f"{name}.py", *sorted((script.parent / name).rglob("*.py"))]
            files += [path for path in beside if path.is_file() and path not in files]
    return files


def _imported_names(file: Path) -> list[str]:
    """The first names of the modules that a file imports; none if the file is missing or is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes(), str(file))))
    except (OSError, ValueError, SyntaxError):
        return []
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return sorted({name.partition(".")[0] for name in names})


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Raise SystemExit at a signal that ends a program, so that mpirun is ended too."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ one attempt


class Attempt:
    """One run of mpirun."""

    def __init__(self, job: Job):
        self.job, self.ranks = job, Ranks(job.ranks)

    def run(self, command: list[str]) -> int:
        """Run the job to its end; return 0 if every rank has finished."""
        terminal = " DISTCLIP_TERMINAL=1" if SCREEN.is_terminal() else ""
        wrapper = ["/bin/sh", "-c", f"export {ENABLED}=1{terminal}\n{WRAPPER}", MARK]
        line = mpirun_line(self.job, [*wrapper, *_rank_command(self.job, command)])
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        process = subprocess.Popen(line, stdin=nothing, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
        outputs = [Output(file, SCREEN, self.ranks.note) for file in (sys.stdout, sys.stderr)]
        try:
            timeout = self._follow(process, outputs)
        finally:
            _end(process)
            for output in outputs:
                output.end()
        code, ended = process.returncode, self.ranks.ended
        if timeout is None and code == 0 and len(ended) == self.job.ranks and not any(ended.values()):
            return 0
        exit_code = code if 0 < code < 256 else 1
        reasons = self._reasons(code, timeout)
        if not reasons:
            reasons = ["mpirun says why above" if any(output.spoke for output in outputs) else "nobody says why"]
        SCREEN.say(f"the job failed (exit code {exit_code}): {'; '.join(reasons)}")
        return exit_code

    def _follow(self, process: subprocess.Popen[bytes], outputs: Sequence[Output]) -> str | None:
        """Pass the output on until mpirun ends; return the message of a timeout."""
        blocks: queue.Queue[tuple[Output, bytes]] = queue.Queue(QUEUED)
        for source, output in zip((process.stdout, process.stderr), outputs, strict=True):
            threading.Thread(target=_read, args=(source, output, blocks), daemon=True).start()
        open_outputs, since, state = len(outputs), time.monotonic(), self.ranks.state
        waiting = False
        while open_outputs:
            timeout_s, message = self._timeout()
            left = math.inf if timeout_s is None else since + timeout_s - time.monotonic()
            if left <= 0:
                return message
            wait_s = min(left, HOLD_S if waiting else math.inf)
            with contextlib.suppress(queue.Empty):
                output, block = blocks.get(timeout=None if wait_s == math.inf else wait_s)
                output.take(block)
                open_outputs -= not block
            waiting = any([output.show_unfinished() for output in outputs])
            if self.ranks.state != state:
                state, since = self.ranks.state, time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return None

    def _timeout(self) -> tuple[float | None, str]:
        """The timeout of the present state in seconds, and its message."""
        return {
            "starting": (START_S, f"{self.ranks.missing} had not started after {START_S:g} s"),
            "running": (None, ""),
            "failing": (FAIL_S, f"mpirun had not ended {FAIL_S:g} s after a rank had failed"),
            "finished": (FINISH_S, f"mpirun had not ended {FINISH_S:g} s after every rank had finished"),
        }[self.ranks.state]

    def _reasons(self, code: int, timeout: str | None) -> list[str]:
        """Why the job failed: the first rank that failed, the silent ranks, the hosts that do not answer."""
        reasons = list(self.ranks.reasons())
        if timeout is not None:
            reasons.append(timeout)
        ranks = ranks_by_host(self.job)
        for host, error in asyncio.run(_unreachable(self.job)).items():
            if ranks[host]:
                reasons.append(f"host {host} does not answer ({error}); it ran {listed(ranks[host])}")
        if code == 0 and (silent := self.ranks.silent):
            reasons.append(f"mpirun returned 0, but {silent} did not report its end")
        if code < 0 and timeout is None:
            reasons.append(f"mpirun was ended by {signal.Signals(-code).name}")
        if not self.ranks.started:
            reasons.append("no rank had started")
        return reasons


def _read(source: IO[bytes] | None, output: Output, blocks: queue.Queue[tuple[Output, bytes]]) -> None:
    """Queue the blocks of an unbuffered pipe: a buffer of Python's has a lock, which a waiting thread holds at exit.

    An empty block is the end.
    """
    assert source is not None
    while block := source.read(2**16):
        blocks.put((output, block))
    blocks.put((output, b""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End mpirun with SIGTERM, so that it ends its ranks; after a timeout with SIGKILL."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
    finally:  # at once after a second Ctrl-C
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _unreachable(job: Job) -> dict[str, str]:
    """The hosts that ssh does not reach, and its error."""
    lines = {host.name: ssh_line(host, ["true"]) for host in job.cluster.hosts if not is_here(host)}
    ends = await asyncio.gather(*(run_bounded(line, SSH_S) for line in lines.values()))
    return {
        host: "ssh got no answer" if code is None else last_line(output) or "ssh failed"
        for host, (code, output) in zip(lines, ends, strict=True)
        if code in (None, 255)
    }
