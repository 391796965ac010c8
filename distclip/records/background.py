"""Write records in a thread, so that training never waits for a slow disk."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distclip.records.sinks import Board, File

LINES = 1024  # that may wait for the disk
WAIT_S = 0.1  # that a step waits when the queue is full, before lines are dropped


class Background:
    """A queue of records, and a thread that writes them to the sinks.

    Records are dropped when the queue stays full. Errors of a sink are printed once and never raised.

    Args:
        sinks: used by the thread alone from now on.
    """

    def __init__(self, sinks: Sequence[File | Board]):
        self._sinks, self._printed = sinks, set[str]()
        self._queue: queue.Queue[tuple[int, Callable[[], dict[str, Any]] | None]] = queue.Queue(LINES)
        self._full, self._dropped, self._given_up = False, 0, False
        self._thread = threading.Thread(target=self._run, name="distclip-record", daemon=True)
        self._thread.start()

    def put(self, record: Callable[[], dict[str, Any]]) -> None:
        """Hand over a function that returns a record: the thread calls it."""
        try:
            self._queue.put((self._dropped, record), timeout=0 if self._full else WAIT_S)
            self._full, self._dropped = False, 0
        except queue.Full:
            self._full = True
            self._dropped += 1
            self._print_once("slow", f"{self._names} takes lines too slowly: training goes on, and lines are dropped")

    def end(self, limit_s: float) -> None:
        """Write what is in the queue and end the thread; give up after the limit."""
        deadline = time.monotonic() + limit_s
        try:
            self._queue.put((self._dropped, None), timeout=limit_s)
            self._thread.join(max(deadline - time.monotonic(), 0.05))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._given_up = True  # the thread ends when the disk lets it go
            self._print_once("end", f"{self._names} did not take the last lines within {limit_s:g} s: they are lost")

    def _run(self) -> None:
        for sink in self._sinks:
            with contextlib.suppress(OSError):  # it is tried again with the first record
                sink.begin()
        while True:
            dropped, record = self._queue.get()
            if self._given_up:
                record = None
            for sink in self._sinks:
                sink.lost += dropped
                with self._no_error(sink):
                    sink.close() if record is None else sink.write(record())
            if record is None:
                return

    @contextlib.contextmanager
    def _no_error(self, sink: File | Board) -> Iterator[None]:
        """No room, no disk, or a report that waits for a rank that is gone: training goes on."""
        try:
            yield
        except Exception as error:
            sink.lost += 1
            text = f"{sink.name} cannot be written ({error}): training goes on, and lines are dropped"
            self._print_once(sink.name, text)

    @property
    def _names(self) -> str:
        return " with ".join(sink.name for sink in self._sinks)

    def _print_once(self, kind: str, text: str) -> None:
        if kind not in self._printed:
            self._printed.add(kind)
            print(f"distclip: {text}.", file=sys.stderr, flush=True)
