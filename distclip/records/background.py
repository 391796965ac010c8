"""A thread for each place that records go to, so that training waits for no disk and no network."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

LINES = 1024  # that may wait

Lines = Callable[[], dict[str, Any]]


class Sink(Protocol):
    """What a thread writes to. Its methods may raise."""

    name: str
    lost: int  # records that it did not get
    wait_s: float  # that a step waits when the queue is full, before records are dropped

    def begin(self) -> None: ...
    def write(self, record: dict[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: str) -> None: ...


class Background:
    """A queue of records, and a thread that writes them to a sink, which no other thread uses from now on.

    Records are dropped when the queue stays full. Errors of the sink are printed once and never raised.
    """

    def __init__(self, sink: Sink):
        self._sink, self._printed = sink, set[str]()
        self._queue: queue.Queue[tuple[int, Lines | threading.Event | None]] = queue.Queue(LINES)
        self._dropped, self._given_up = 0, False
        self._end: tuple[str, int] | None = None  # how the run ended, and how many records were dropped last
        self._thread = threading.Thread(target=self._run, name="distclip-record", daemon=True)
        self._thread.start()

    def put(self, record: Lines) -> None:
        """Hand over a function that returns a record: the thread calls it."""
        try:
            self._queue.put((self._dropped, record), timeout=0 if self._dropped else self._sink.wait_s)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1
            name = self._sink.name
            self._print_once("slow", f"{name} takes lines too slowly: training goes on, and lines are dropped")

    def flush(self, limit_s: float) -> None:
        """Wait until all that was put is written; give up after the limit."""
        written, deadline = threading.Event(), time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._queue.put((self._dropped, written), timeout=limit_s)
            self._dropped = 0
            written.wait(max(deadline - time.monotonic(), 0.0))
        if not written.is_set():
            name = self._sink.name
            text = f"{name} did not take the last lines within {limit_s:g} s: training goes on without waiting"
            self._print_once("flush", text)

    def ask_to_end(self, status: str) -> None:
        """Have the thread write what is in the queue and close the sink. Nothing is put from now on."""
        self._end = (status, self._dropped)
        with contextlib.suppress(queue.Full):  # then the thread finds the end when the queue is empty
            self._queue.put_nowait((0, None))

    def wait_for_end(self, deadline: float, limit_s: float) -> None:
        """Wait for the thread until a moment of the monotonic clock, which is ``limit_s`` after the call of the end."""
        self._thread.join(max(deadline - time.monotonic(), 0.05))
        if self._thread.is_alive():
            self._given_up = True  # the thread ends when the sink lets it go
            text = f"{self._sink.name} did not take the last lines within {limit_s:g} s: they are lost"
            self._print_once("end", text)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # it is tried again with the first record
            self._sink.begin()
        while not (self._end and (self._given_up or self._queue.empty())):
            dropped, item = self._queue.get()
            self._sink.lost += dropped
            if isinstance(item, threading.Event):
                self._try(self._sink.flush)
                item.set()
            elif item is not None and not self._given_up:
                self._try(lambda: self._sink.write(item()))  # noqa: B023
        status, dropped = self._end
        self._sink.lost += dropped
        self._try(lambda: self._sink.close(status))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # no room, no disk, no network, or a report that waits for a rank that is gone
            self._sink.lost += 1
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            name = self._sink.name
            self._print_once("error", f"{name} cannot be written ({why}): training goes on, and lines are dropped")

    def _print_once(self, kind: str, text: str) -> None:
        if kind not in self._printed:
            self._printed.add(kind)
            print(f"distclip: {text}.", file=sys.stderr, flush=True)


class Once:
    """A function of a record that several threads call: the first evaluates it, the others get the same."""

    def __init__(self, record: Lines):
        self._record, self._lock, self._value = record, threading.Lock(), dict[str, Any]()

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            self._value = self._value or self._record()
        return self._value


def end(backgrounds: Sequence[Background], status: str, limit_s: float) -> None:
    """Write what is in the queues and end the threads; give up after the limit, which they have together."""
    deadline = time.monotonic() + limit_s
    for background in backgrounds:
        background.ask_to_end(status)
    for background in backgrounds:
        background.wait_for_end(deadline, limit_s)
