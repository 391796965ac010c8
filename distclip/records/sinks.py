"""Where records go: a line on the terminal, a file of JSON lines, TensorBoard.

A thread writes the files, so that training never waits for a slow disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distclip.lock import DYING_S, Lock, describe
from distclip.records.read import NAMES, strict, was_clipped
from distclip.terminal import on_terminal

LINES = 1024  # that may wait for the disk
WAIT_S = 0.1  # that a step waits when the queue is full, before lines are dropped


class Background:
    """A queue of records, and a thread that writes them to the sinks, which no other thread uses from now on.

    Records are dropped when the queue stays full. Errors of a sink are printed once and never raised.
    """

    def __init__(self, sinks: Sequence[File | Board]):
        self._sinks, self._printed = sinks, set[str]()
        self._names = " with ".join(sink.name for sink in sinks)
        self._queue: queue.Queue[tuple[int, Callable[[], dict[str, Any]] | threading.Event | None]] = queue.Queue(LINES)
        self._dropped, self._given_up = 0, False
        self._thread = threading.Thread(target=self._run, name="distclip-record", daemon=True)
        self._thread.start()

    def put(self, record: Callable[[], dict[str, Any]]) -> None:
        """Hand over a function that returns a record: the thread calls it."""
        try:
            self._queue.put((self._dropped, record), timeout=0 if self._dropped else WAIT_S)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1
            self._print_once("slow", f"{self._names} takes lines too slowly: training goes on, and lines are dropped")

    def flush(self, limit_s: float) -> None:
        """Wait until all that was put is on the disk; give up after the limit."""
        written, deadline = threading.Event(), time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._queue.put((self._dropped, written), timeout=limit_s)
            self._dropped = 0
            written.wait(max(deadline - time.monotonic(), 0.0))
        if not written.is_set():
            text = f"{self._names} did not take the last lines within {limit_s:g} s: training goes on without waiting"
            self._print_once("flush", text)

    def end(self, limit_s: float) -> None:
        """Write what is in the queue and end the thread; give up after the limit."""
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._queue.put((self._dropped, None), timeout=limit_s)
            self._thread.join(max(deadline - time.monotonic(), 0.05))
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
                try:
                    if record is None:
                        sink.close()
                    elif isinstance(record, threading.Event):
                        sink.flush()
                    else:
                        sink.write(record())
                except Exception as error:  # no room, no disk, or a report that waits for a rank that is gone
                    sink.lost += 1
                    text = f"{sink.name} cannot be written ({error}): training goes on, and lines are dropped"
                    self._print_once(sink.name, text)
            if isinstance(record, threading.Event):
                record.set()
            if record is None:
                return

    def _print_once(self, kind: str, text: str) -> None:
        if kind not in self._printed:
            self._printed.add(kind)
            print(f"distclip: {text}.", file=sys.stderr, flush=True)


class File:
    """A file that gets a header, then a line for each record, each handed to the system at once.

    Raises:
        OSError: it cannot be opened, or another program is writing it.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_of(path)
        self.name, self.lost = f"the record {path}", 0  # records that the file lacks and does not mention yet
        self._header, self._hosts = header, None
        self._file = path.open("ab", buffering=0)
        # whether it ends within a line: its writer was killed, or its disk was full
        self._torn = path.is_file() and path.stat().st_size > 0 and _last_byte(path) != b"\n"

    def begin(self) -> None:
        """Write what must stand before the next record: the header, and how many records are missing."""
        if self._header:
            self._line(self._header)
            self._header = {}
        if self.lost:
            self._line({"kind": "dropped", "steps": self.lost})
            self.lost = 0

    def write(self, record: dict[str, Any]) -> None:
        self.begin()
        hosts = record.get("rank_hosts")  # written when they change
        self._line({name: value for name, value in record.items() if name != "rank_hosts" or hosts != self._hosts})
        self._hosts = hosts

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.begin()
        self._file.close()
        if self._lock:
            self._lock.release()

    def flush(self) -> None:
        """Put what is written on the disk itself: the host may lose power."""
        with contextlib.suppress(OSError):  # a pipe has no disk
            os.fsync(self._file.fileno())

    def _line(self, record: dict[str, Any]) -> None:
        text = json.dumps(strict(record), allow_nan=False, default=str, separators=(",", ":")) + "\n"
        rest = memoryview(text.encode() if not self._torn else b"\n" + text.encode())
        while rest:  # a disk that fills takes a part of a line
            try:
                written = self._file.write(rest)
            except OSError:
                if rest.tobytes() == b"\n":  # the record is whole: the next line writes its end
                    return
                raise
            self._torn = written < len(rest)
            rest = rest[written:]


def _lock_of(path: Path) -> Lock | None:
    """The lock beside a record. Something else than a file, such as a pipe, needs none."""
    if path.exists() and not path.is_file():
        return None
    path = path.resolve()
    lock = Lock(path.with_name(f".{path.name}.lock"))
    if not lock.take_within(DYING_S):
        raise OSError(f"the record {path} is being written by {describe(lock.owner())}: name another file")
    return lock


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


class Board:
    """A folder for TensorBoard, which gets every number of a record under its name."""

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            raise ImportError(
                "Recorder(tensorboard=...) needs the package tensorboard: pip install tensorboard"
            ) from error
        self.name, self.lost = f"TensorBoard's folder {os.fspath(folder)}", 0
        self._writer = Writer(os.fspath(folder))

    def begin(self) -> None:
        """Nothing: it has no header."""

    def flush(self) -> None:
        self._writer.flush()

    def write(self, record: dict[str, Any]) -> None:
        for name, value in _flat(record):
            self._writer.add_scalar(name, float(value), record["step"])

    def close(self) -> None:
        self._writer.close()


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, list) and name != "rank_hosts":
            value = dict(enumerate(value))
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif name not in ("kind", "step", "time", "rank_hosts"):
            yield f"{prefix}{name}", value


class Live:
    """A line for each step: on a terminal a line that changes, with a bar if the last step is known, else a line every
    ``every`` steps.
    """

    def __init__(self, every: int, steps: int | None = None):
        self.every, self.steps, self.terminal = every, steps, on_terminal(sys.stdout)
        self.seen, self.clipped, self.skipped, self.shown_at = 0, 0, 0, 0.0
        self.values: dict[str, float] = {}
        self.text = ""

    def show(self, step: dict[str, Any]) -> None:
        self.seen += 1
        self.clipped += was_clipped(step)
        self.skipped += bool(step.get("skipped"))
        self.values |= {name: value for name, value in step.items() if name not in NAMES and name != "step"}
        self.text = self._text(step)
        if self.terminal and time.monotonic() - self.shown_at > 0.1:  # more often than the eye can follow is slow
            self._print("")
        elif not self.terminal and (self.seen - 1) % self.every == 0:
            print(self.text, flush=True)

    def end(self) -> None:
        if self.terminal and self.seen:
            self._print("\n")
        elif self.seen and (self.seen - 1) % self.every:
            print(self.text, flush=True)

    def _text(self, step: dict[str, Any]) -> str:
        values = self.values | {"norm": step["norm"], "threshold": step.get("threshold")}
        bar = f"{_bar(step['step'] / self.steps)} " if self.steps and self.terminal else ""
        parts = [f"{bar}step {step['step']}" + (f"/{self.steps}" if self.steps else "")]
        parts += [f"{name} {_number(value)}" for name, value in values.items() if isinstance(value, (int, float))]
        parts += [f"clipped {self.clipped / self.seen:.0%}", f"skipped {self.skipped}"]
        parts += [f"{step['step_s'] * 1e3:.3g} ms"] if "step_s" in step else []
        return "  ".join(parts)

    def _print(self, end: str) -> None:
        self.shown_at = time.monotonic()
        width = os.get_terminal_size().columns or 80
        print(f"\r{self.text[: width - 1]}\x1b[K", end=end, flush=True)


def _bar(share: float) -> str:
    """
    >>> _bar(0.4)
    '[####      ]'
    """
    return f"[{'#' * min(int(10 * share), 10):<10}]"


def _number(value: float) -> str:
    """
    >>> _number(0.123456), _number(23456.7), _number(1e12)
    ('0.1235', '23,457', '1e+12')
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
