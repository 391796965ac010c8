"""The guard of a rank: a small process that limits the time for joining, and ends what the rank started with it.

A rank cannot do this itself: MLX holds Python's lock while it joins, and kill -9 leaves no time. The guard waits at a
pipe whose other end the rank alone holds, so it sees the rank's end however it comes. It runs this file, with the
standard library alone.

What a rank started is its process group, which mpirun makes for each rank: workers of data loaders are in it, and what
was started with ``start_new_session=True`` is not. A rank that ends by itself leaves its group alone.

Open MPI 5.0.11 may hang for ever when a rank ends while it joins (a lock in PMIx). Then it leaves the rank a zombie.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass

JOINED, LEFT = b"j", b"l"  # what the rank writes
START_S = 20.0  # timeout for the start of the process
NOTICE_S = 60.0  # before a first message about ranks that have not called init()
GRACE_S = 1.0  # for processes that end by themselves when their rank has ended
NOTICED_S = 10.0  # for mpirun to notice the end of its rank


@dataclass(frozen=True)
class Joining:
    """The rank, and how long it may wait for the others in init()."""

    who: str
    rank: int
    size: int
    local_size: int  # ranks on this host
    folder: str | None  # where each rank of this host that has called init() makes a file
    limit_s: float  # 0: none
    mark: str  # for the launcher, before the rank is ended
    notice_s: float = NOTICE_S


class Guard:
    """The rank's end of the pipe."""

    def __init__(self, pipe: int | None):
        self._pipe, self._process = pipe, os.getpid()
        if pipe is not None:
            os.register_at_fork(after_in_child=lambda: os.close(pipe))  # a forked worker would hold it open

    def joined(self) -> None:
        """The rank has joined the world: no limit any more."""
        self._write(JOINED)

    def leave(self) -> None:
        """The rank ends by itself: what it started may go on."""
        self._write(LEFT)

    def _write(self, byte: bytes) -> None:
        if self._pipe is not None and os.getpid() == self._process:  # a forked child is no rank
            with contextlib.suppress(OSError):
                os.write(self._pipe, byte)


def start(joining: Joining, group: int, mpirun: int) -> Guard:
    """Start the guard of this rank. Where no process can be started, nothing is guarded.

    Args:
        group: the process group that ends with the rank; 0: none.
        mpirun: the process that ends if it does not notice the end of the rank; 0: none.
    """
    if joining.folder is not None:
        with contextlib.suppress(OSError):
            os.makedirs(joining.folder, exist_ok=True)
            open(os.path.join(joining.folder, str(joining.rank)), "w").close()
    theirs, ours = os.pipe()
    line = [sys.executable, "-I", "-S", __file__, *map(str, (os.getpid(), group, mpirun)), json.dumps(asdict(joining))]
    nothing = subprocess.DEVNULL
    try:
        subprocess.run(line, stdin=theirs, stdout=nothing, start_new_session=True, timeout=START_S, check=True)
    except (OSError, subprocess.SubprocessError):
        os.close(ours)
        return Guard(None)
    finally:
        os.close(theirs)
    return Guard(ours)


# ------------------------------------------------------------------------------------------------ the process


def guard(rank: int, group: int, mpirun: int, joining: Joining) -> None:
    """Limit the time for joining; then wait for the rank's end, and end its group unless it ended by itself."""
    if os.fork():  # no child of the rank, which may wait for all of its own
        os._exit(0)
    _limit(rank, joining)
    os.dup2(1, 2)  # mpirun waits until nobody holds the rank's output
    while (byte := os.read(0, 1)) == JOINED:
        pass
    if byte == LEFT:
        return
    while _state(rank) not in ("", "Z"):  # it has closed the pipe, and runs
        time.sleep(0.1)
    time.sleep(GRACE_S)
    _kill(-group)
    if mpirun:
        deadline = time.monotonic() + NOTICED_S
        while _state(rank) == "Z" and _state(mpirun) not in ("", "T"):  # T: Ctrl-Z
            if time.monotonic() > deadline:
                _kill(mpirun)
            time.sleep(0.1)


def _limit(rank: int, joining: Joining) -> None:
    """Return when the rank has joined or ended; end it after the limit."""
    began, limit = time.monotonic(), joining.limit_s
    for deadline in sorted({joining.notice_s, limit} - {0.0}):
        if limit and deadline > limit:
            return
        if select.select([0], [], [], began + deadline - time.monotonic())[0]:
            return
        text = f"distclip: {joining.who} has waited {deadline:g} s in init() {_for_whom(joining)}"
        if deadline != limit:
            _print(text + ".\n")
        else:
            change = "init(timeout=SECONDS) or DISTCLIP_INIT_TIMEOUT changes the limit, 0 removes it"
            _print(f"{text}; the whole job ends. {change}.\n{joining.mark}")
            _kill(rank)


def _for_whom(joining: Joining) -> str:
    """The ranks that have not called init(), as far as this host knows."""
    try:
        here = sorted(int(name) for name in os.listdir(joining.folder or ""))
    except (OSError, ValueError):
        return "for the other ranks"
    if joining.local_size < joining.size:
        count = f"{len(here)} of {joining.local_size} on this host called it"
        return f"for other ranks; {count}: {listed(here)}"
    if missing := sorted(set(range(joining.size)) - set(here)):
        return f"for {listed(missing)}, which did not call it"
    return "though every rank has called it"


def listed(ranks: Collection[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _print(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _state(process: int) -> str:
    """The state of a process, a letter as of ps. Z: it has ended, and its parent has not noticed. Empty: it is gone."""
    if not os.path.exists("/proc/self/stat"):
        line = ["ps", "-o", "stat=", "-p", str(process)]
        return subprocess.run(line, capture_output=True, text=True).stdout.strip()[:1]
    try:
        with open(f"/proc/{process}/stat") as file:  # a small Linux may have no ps
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _kill(process: int) -> None:
    """Kill a process; a group, if the number is below 0; nothing, if it is 0."""
    if process:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Joining(**json.loads(sys.argv[4])))
