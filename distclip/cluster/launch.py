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
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from distclip.cluster.agent import last_line
from distclip.cluster.doctor import preflight
from distclip.cluster.hosts import Job, add_host_arguments, job_of
from distclip.cluster.mpirun import is_here, mpirun_line, ranks_by_host, ssh_line
from distclip.cluster.remote import run_bounded
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
# Starts each rank, and marks on which host, and how the rank ended, kill -9 included.
WRAPPER = f"""export {ENABLED}=1
printf '{MARK} %s started %s\\n' "$OMPI_COMM_WORLD_RANK" "$(uname -n)" >&2; "$@"; code=$?
printf '{MARK} %s ended %s\\n' "$OMPI_COMM_WORLD_RANK" "$code" >&2; exit "$code\""""
MARKED = re.compile(rf"{MARK} (\d+) (started|ended|overdue|recovered|failing) (\S+)")
RANK = re.compile(r"(\[\d+\])<(?:stdout|stderr)>: ?")  # what `mpirun --output rank` puts before a line
PEER_LOST = 14  # the exit code of a rank whose MPI has lost another


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
        print(shlex.join(mpirun_line(job, _rank_command(job, command))))
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
        if code == 0 or not left or len(attempt.started) < job.ranks:  # a rank that did not start would fail again
            break
        if "--resume" not in command:
            command = [*command, "--resume"]
        _print(f"starting again with --resume; attempts left: {left}")
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
                _print(f"{failure.host}: {failure.check}: {failure.message} -> {failure.remedy}")
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


def _print(text: str) -> None:
    print(f"distclip: {text}", file=sys.stderr, flush=True)


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


@dataclass
class Attempt:
    """One run of mpirun, and the marks of its ranks."""

    job: Job
    started: dict[int, str] = field(default_factory=dict)  # rank -> its host
    ended: dict[int, int] = field(default_factory=dict)  # rank -> its exit code, in the order of the marks
    overdue: dict[int, int] = field(default_factory=dict)  # rank with an overdue watchdog -> its last step, or 0
    failing: bool = False  # whether a rank has failed

    def run(self, command: list[str]) -> int:
        """Run the job to its end; return 0 if every rank has finished."""
        line = mpirun_line(self.job, ["/bin/sh", "-c", WRAPPER, MARK, *_rank_command(self.job, command)])
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        process = subprocess.Popen(line, stdin=nothing, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
        try:
            timeout = self._follow(process)
        finally:
            _end(process)
        code = process.returncode
        if timeout is None and code == 0 and len(self.ended) == self.job.ranks and not any(self.ended.values()):
            return 0
        self._explain(code, timeout)
        return code if 0 < code < 256 else 1

    def _follow(self, process: subprocess.Popen[bytes]) -> str | None:
        """Pass the output on until mpirun ends; return the message of a timeout."""
        lines: queue.SimpleQueue[tuple[IO[str], bytes | None]] = queue.SimpleQueue()
        streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        for source, target in streams:
            threading.Thread(target=_read, args=(source, target, lines), daemon=True).start()
        open_streams, since, state = len(streams), time.monotonic(), self._state()
        while open_streams:
            timeout_s, message = self._timeout()
            left = None if timeout_s is None else since + timeout_s - time.monotonic()
            if left is not None and left <= 0:
                return message
            try:
                target, raw = lines.get(timeout=left)
            except queue.Empty:
                continue
            if raw is None:
                open_streams -= 1
                continue
            print(self.read(raw.decode(errors="replace").replace("\0", "")), end="", file=target, flush=True)
            if self._state() != state:
                state, since = self._state(), time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return None

    def _state(self) -> str:
        if self.failing:
            return "failing"
        if len(self.ended) == self.job.ranks:
            return "finished"
        return "running" if len(self.started) == self.job.ranks else "starting"

    def _timeout(self) -> tuple[float | None, str]:
        """The timeout of the present state in seconds, and its message."""
        missing = _listed(set(range(self.job.ranks)) - self.started.keys())
        return {
            "starting": (START_S, f"{missing} had not started after {START_S:g} s"),
            "running": (None, ""),
            "failing": (FAIL_S, f"mpirun had not ended {FAIL_S:g} s after a rank had failed"),
            "finished": (FINISH_S, f"mpirun had not ended {FINISH_S:g} s after every rank had finished"),
        }[self._state()]

    def read(self, line: str) -> str:
        """Note the marks in a line of mpirun's output, and return the line without them, as it is shown."""
        lines = RANK.sub(r"\n\1 ", line).split("\n")  # mpirun joins what ranks wrote without ending the line
        lines = [MARKED.sub(self._note, text) for text in lines]
        return "".join(text + "\n" for text in lines if not re.fullmatch(r"(\[\d+\])?\s*", text))

    def _note(self, mark: re.Match[str]) -> str:
        rank, event, word = int(mark[1]), mark[2], mark[3]
        self.failing = self.failing or event == "failing" or (event == "ended" and word != "0")
        if event == "started":
            self.started[rank] = word
        elif event == "overdue":
            self.overdue[rank] = int(word)
        elif event == "recovered":
            self.overdue.pop(rank, None)
        elif event == "ended":
            self.ended[rank] = int(word)
        return ""

    def _explain(self, code: int, timeout: str | None) -> None:
        """Print why the job failed: the first rank that failed, the silent ranks, the hosts that do not answer."""
        reasons = [*self._failed_ranks(), *self._overdue_ranks()]
        if timeout is not None:
            reasons.append(timeout)
        ranks = ranks_by_host(self.job)
        for host, error in asyncio.run(_unreachable(self.job)).items():
            if ranks[host]:
                reasons.append(f"host {host} does not answer ({error}); it ran {_listed(ranks[host])}")
        if code == 0 and (silent := self.started.keys() - self.ended.keys()):
            reasons.append(f"mpirun returned 0, but {self._names(silent)} did not report its end")
        if not self.started:
            reasons.append("no rank had started")
        _print(f"the job failed (exit code {code if code else 1}): {'; '.join(reasons) or 'mpirun says why above'}")

    def _failed_ranks(self) -> Iterator[str]:
        # Ranks that lost the rank that failed may be reported before it.
        for code in sorted(dict.fromkeys(self.ended.values()), key=lambda code: code == PEER_LOST):
            yield f"{self._names({rank for rank, its in self.ended.items() if its == code})} ended {_by(code)}"

    def _overdue_ranks(self) -> Iterator[str]:
        silent = self.started.keys() - self.overdue.keys() - self.ended.keys()
        if self.overdue and silent:
            why = "stopped, cut off, or busy with something else"
            yield f"{self._names(silent)} did not report when the watchdogs of the others did: {why}"
        if len(set(self.overdue.values())) > 1:
            least = min(self.overdue.values())
            behind = {rank for rank, step in self.overdue.items() if step == least}
            yield f"{self._names(behind)} came only to step {least}"

    def _names(self, ranks: set[int]) -> str:
        return ", ".join(f"rank {rank} on {self.started[rank]}" for rank in sorted(ranks & self.started.keys()))


def _read(source: IO[bytes] | None, target: IO[str], lines: queue.SimpleQueue[tuple[IO[str], bytes | None]]) -> None:
    """Queue the lines of an unbuffered pipe: a buffer of Python's has a lock, which a waiting thread holds at exit."""
    assert source is not None
    rest = b""
    while block := source.read(2**16):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            lines.put((target, line + b"\n"))
    lines.put((target, rest))
    lines.put((target, None))


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


def _listed(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _by(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(code - 128).name}"
    return f"with exit code {code}" + (" (it had lost another rank)" if code == PEER_LOST else "")
