"""A timeout for steps: when no step ends in time, every rank that still runs prints its stacks, and the job ends."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

from distclip.marks import mark
from distclip.world import init

TICK_S = 1.0  # between two checks of the thread, at most
LATE_S = 1.0  # a check that is this late: the process was stopped
GRACE_S = 2.0  # for the other ranks, which time out at nearly the same moment, to report too


class Watchdog:
    """End the job when no step ends in time: a rank that is stopped, cut off or gone costs minutes, not a night.

    A collective waits for ever for a rank that does not join it. After the timeout each rank that still runs prints its
    rank, host, last step and the stacks of its threads. It exits 2 s later with code 1, and ``mpirun`` ends the whole
    job. Look for the rank that printed nothing. If the step ends within these 2 s, the job goes on.

        with dc.Watchdog(timeout=120) as watchdog:
            for batch in batches:
                ...
                mx.eval(model.parameters(), optimizer.state)
                watchdog()

    It is a plain callback too: ``watchdog = dc.Watchdog(120)``, called at the end of each step, watches from the first
    call to ``close()`` or the end of the program.

    Every rank needs a watchdog, since a stopped rank cannot report itself. The first step has the same timeout: let it
    include loading and compiling, or enter the context after them. A process that was stopped (Ctrl-Z) gives its step
    the whole timeout again. A C extension that waits and holds the GIL stops the watchdog of its own rank; those of the
    other ranks end the job.

    Args:
        timeout (float): seconds for a step: more than the slowest good step with its validation and checkpoint.

    Raises:
        ValueError: ``timeout`` is not above 0 and finite.
    """

    def __init__(self, timeout: float) -> None:
        if not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
            raise ValueError(f"timeout should be seconds, > 0 and finite, {timeout!r} was provided instead")
        world = init()
        self.timeout = float(timeout)
        self._rank = world.rank
        self._who = f"rank {world.rank} of {world.size} on {socket.gethostname()}"
        self._process = os.getpid()
        self._last: tuple[int, float] = (0, 0.0)  # the last step that ended, and when: replaced whole, so no lock
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._forget: Callable[[], None] = lambda: None

    def __call__(self, *_: object, step: int | None = None, **__: object) -> None:
        """A step has ended. Ignores the arguments of a trainer's callback, except ``step``, the step's number.

        Raises:
            ValueError: the watchdog is closed.
        """
        if self._thread is None or self._closed.is_set():
            self._start()
        self._last = (self._last[0] + 1 if step is None else step, time.monotonic())

    def __repr__(self) -> str:
        return f"Watchdog(timeout={self.timeout:g})"

    def __enter__(self) -> Watchdog:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching. A second call does nothing."""
        if os.getpid() != self._process:  # a forked child does not have the thread
            return
        self._closed.set()
        self._forget()
        if self._thread is not None:
            self._thread.join()  # a live thread can change the exit code

    def _start(self) -> None:
        if self._closed.is_set():
            raise ValueError("The watchdog is closed")
        if self._thread is not None or os.getpid() != self._process:
            return
        self._last = (0, time.monotonic())
        # A daemon: Python joins other threads at exit before it runs the callback that closes this one.
        self._thread = threading.Thread(target=self._watch, name="distclip-watchdog", daemon=True)
        self._thread.start()
        self._forget = init().on_end(self.close)

    def _watch(self) -> None:
        extended, since = (-1, 0.0), 0.0  # a step that has its whole timeout again, and its new start
        left = self.timeout
        while True:
            checked, tick = time.monotonic(), max(min(TICK_S, self.timeout / 4, left), 0.0)
            if self._closed.wait(tick):
                return
            now, last = time.monotonic(), self._last
            if now - checked > tick + LATE_S and last is not extended:
                extended, since = last, now
            left = (since if last is extended else last[1]) + self.timeout - now
            if left <= 0 and self._report(last):
                os._exit(1)  # anything gentler waits for ranks that wait for this one

    def _report(self, last: tuple[int, float]) -> bool:
        """Print the stacks, and wait for the grace period; return whether the job ends."""
        mark(self._rank, "overdue", last[0])
        step = f"the last was step {last[0]}" if last[0] else "it is the first"
        self._print(f"no step has ended for {self.timeout:g} s; {step}. The stacks of its threads:\n{_stacks()}")
        threading.Thread(target=_flush, daemon=True).start()  # it may wait for ever for a full pipe
        closed = self._closed.wait(GRACE_S)
        if self._last is not last:
            mark(self._rank, "recovered", self._last[0])
            self._print(f"step {self._last[0]} has ended after all; the job goes on.\n")
        elif not closed:
            self._print("the whole job ends.\n")
            mark(self._rank, "failing", "overdue")
            return True
        return False

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"distclip: {self._who}: {text}".encode())  # one call, so that ranks do not mix


def _stacks() -> str:
    """The stack of each other thread, without source lines: the disk may hang."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    main = threading.main_thread().ident
    for thread, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if thread != threading.get_ident():
            lines.append(f"{names.get(thread, thread)} (most recent call first):")
            for caller, line in traceback.walk_stack(frame):
                lines.append(f'  File "{caller.f_code.co_filename}", line {line} in {caller.f_code.co_name}')
    return "\n".join(lines) + "\n"


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
