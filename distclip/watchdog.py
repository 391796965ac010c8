"""A bound on hangs: when no step ends in time, every rank that still runs says where it is, and the job ends."""

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

TICK_S = 1.0  # between two looks of the thread, at most
LATE_S = 1.0  # a look that comes so much later than asked for: the process was stopped meanwhile
GRACE_S = 2.0  # for the other ranks, whose time is up at nearly the same moment, to speak too


class Watchdog:
    """End the job when no step ends in time: a rank that is stopped, cut off or gone costs minutes, not a night.

    A collective waits for ever for a rank that does not join it. Where that lasts too long, each rank that still runs
    prints its rank, host, last step and the stacks of its threads, and leaves 2 s later with exit code 1, at which
    ``mpirun`` ends the whole job. The rank that did not speak is the one to look for. A step that ends within these 2 s
    calls it off.

        with dc.Watchdog(timeout=120) as watchdog:
            for batch in batches:
                ...
                mx.eval(model.parameters(), optimizer.state)
                watchdog()

    It is a plain callback too: ``watchdog = dc.Watchdog(120)``, called at the end of each step, watches from the first
    call on, until ``close()`` or the end of the program.

    Every rank needs one, since a rank that is stopped cannot speak for itself. The first step has no more time than the
    others: choose a timeout that its loading and compiling fit into, or enter the context after them. Time in which the
    process was stopped (Ctrl-Z) does not end it: the step is given its whole time once more. What keeps Python from
    running any other thread, such as a C extension that waits without releasing the GIL, stops the watchdog of that
    rank too; those of the other ranks end the job.

    Args:
        timeout (float): seconds that a step may take: more than the slowest good one, with all that the ranks wait for
            in it (validation, a checkpoint).

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
        """A step has ended. What trainers hand to their callbacks is ignored, but for ``step``, the step's number.

        Raises:
            ValueError: the watchdog is closed.
        """
        if self._thread is None or self._closed.is_set():
            self._start()
        self._last = (self._last[0] + 1 if step is None else step, time.monotonic())

    def __enter__(self) -> Watchdog:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more. A second call does nothing."""
        if os.getpid() != self._process:  # a forked child has no such thread
            return
        self._closed.set()
        self._forget()
        if self._thread is not None:
            self._thread.join()  # alive at exit, it would spoil the exit code

    def _start(self) -> None:
        if self._closed.is_set():
            raise ValueError("The watchdog is closed")
        if self._thread is not None or os.getpid() != self._process:
            return
        self._last = (0, time.monotonic())
        # A daemon, as Python would wait for another kind at exit, before it runs what atexit closes it with.
        self._thread = threading.Thread(target=self._watch, name="distclip-watchdog", daemon=True)
        self._thread.start()
        self._forget = init().on_end(self.close)

    def _watch(self) -> None:
        prolonged, since = (-1, 0.0), 0.0  # a step that is given its time once more, and from when on
        left = self.timeout
        while True:
            looked, tick = time.monotonic(), max(min(TICK_S, self.timeout / 4, left), 0.0)
            if self._closed.wait(tick):
                return
            now, last = time.monotonic(), self._last
            if now - looked > tick + LATE_S and last is not prolonged:
                prolonged, since = last, now
            left = (since if last is prolonged else last[1]) + self.timeout - now
            if left <= 0 and self._ends(last):
                os._exit(1)  # anything gentler waits for ranks that wait for this one

    def _ends(self, last: tuple[int, float]) -> bool:
        """Speak, and wait a little: whether the job is to end."""
        mark(self._rank, "overdue", last[0])
        which = f"the last was step {last[0]}" if last[0] else "it is the first"
        self._say(f"no step has ended for {self.timeout:g} s; {which}. The stacks of its threads:\n{_stacks()}")
        threading.Thread(target=_flush, daemon=True).start()  # not here: who prints to a full pipe holds its lock
        closed = self._closed.wait(GRACE_S)
        if self._last is not last:
            mark(self._rank, "recovered", self._last[0])
            self._say(f"step {self._last[0]} has ended after all; the job goes on.\n")
        elif not closed:
            self._say("the whole job ends.\n")
            mark(self._rank, "failing", "overdue")
            return True
        return False

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"distclip: {self._who}: {text}".encode())  # at once, so that ranks do not mix


def _stacks() -> str:
    """Where each thread is, but for this one, without a look at the sources: their disk may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    main = threading.main_thread().ident
    for thread, frame in sorted(sys._current_frames().items(), key=lambda one: one[0] != main):
        if thread != threading.get_ident():
            lines.append(f"{names.get(thread, thread)} (most recent call first):")
            for at, line in traceback.walk_stack(frame):
                lines.append(f'  File "{at.f_code.co_filename}", line {line} in {at.f_code.co_name}')
    return "\n".join(lines) + "\n"


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
