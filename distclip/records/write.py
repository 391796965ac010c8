"""One line per step in a file: what was clipped and why, written off the training path and read back for the report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from distclip.records import sinks
from distclip.records.live import Live
from distclip.records.read import FORMAT, KIND, NAMES
from distclip.records.strict import plain, strict
from distclip.world import init

LINES = 1024  # that may wait for the disk
WAIT_S = 0.1  # that a step may wait once the lines are as many, before lines are dropped
CLOSE_S = 10.0  # that the end of a good run waits for the disk
FAIL_S = 1.0  # and that of a failed one


# ------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Step:
    """What a call was given: nothing is evaluated yet."""

    report: Any
    values: dict[str, Any]
    time: float
    seconds: float | None

    def evaluated(self) -> dict[str, Any]:
        found: dict[str, Any] = plain(self.report.to_dict() if hasattr(self.report, "to_dict") else self.report)
        times = {"time": round(self.time, 3)} | ({} if self.seconds is None else {"step_s": round(self.seconds, 6)})
        found |= plain(self.values)
        return found | times


class Recorder:
    """Write what a :class:`distclip.Clipper` does to a file, one line of JSON per step, from rank 0.

    Call it on every rank alike, once a step, after the step is evaluated. A report is looked at one call later, when
    the next step is under way and its own arrays are done, so recording waits for nothing; the last one is looked at
    when the recorder is closed. The other ranks evaluate with rank 0 and write nothing. Each line is written and
    handed to the system at once by a thread of its own, so a job that is killed loses the last step's line alone.

        with dc.Recorder("runs/a.jsonl", config={"lr": 1e-3}) as record:
            for batch in batches:
                ...
                record(report, loss=loss)

    A disk that is slow, full or gone never ends the training: lines that cannot be written are dropped, counted in the
    file and, once, told on rank 0's standard error.

    Args:
        path: the file; a run that goes on appends to it. Its folder is made.
        every (int): write each so many steps, and every step whose norm was not finite.
        config (dict, optional): kept in the header: what JSON can hold; other values as their text.
        tensorboard (path, optional): a folder for TensorBoard, which gets the same numbers
            (``pip install 'distclip[tensorboard]'``).
        live (bool): show the steps on rank 0's standard output: one line that changes on a terminal, else a line every
            ``live_every`` steps.

    Raises:
        OSError: the file cannot be opened.
        ImportError: ``tensorboard`` is asked for and not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
        config: Mapping[str, Any] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        live: bool = False,
        live_every: int = 10,
    ) -> None:
        if every < 1 or live_every < 1:
            raise ValueError(f"every and live_every should be at least 1, {every} and {live_every} were provided")
        world = init()
        self.path, self.every = Path(path), every
        self._writes, self._process, self._closed = world.rank == 0, os.getpid(), False
        self._held: _Step | None = None
        self._last_call, self._count = 0.0, 0
        if not self._writes:
            return
        self._live = Live(live_every) if live else None
        header = {"kind": KIND, "format": FORMAT, "distclip": version("distclip"), "mlx": version("mlx")}
        header |= {"ranks": world.size, "backend": world.backend, "host": socket.gethostname(), "every": every}
        header |= {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "config": dict(config or {})}
        self._file = _File(self.path, header, tensorboard)
        self._queue: queue.Queue[tuple[int, _Step | dict[str, Any] | None]] = queue.Queue(LINES)
        self._full, self._dropped, self._given_up = False, 0, False
        self._thread = threading.Thread(target=self._write, name="distclip-record", daemon=True)
        self._thread.start()
        self._forget = world.on_end(self._fail)

    def __call__(self, report: Any, **values: Any) -> None:
        """Record a step.

        Args:
            report (Report or dict): of the clipper, or numbers by name, with ``step`` and ``norm`` among them.
            **values: more numbers of the step, such as ``loss``: Python's or arrays of no dimensions; None is left out.
                ``step`` takes the place of the report's own.

        Raises:
            TypeError, ValueError: a value is no number, or has a name that the record uses itself.
        """
        if self._closed:
            raise ValueError(f"The recorder of {self.path} is closed")
        if not hasattr(report, "to_dict") and not (isinstance(report, Mapping) and {"step", "norm"} <= report.keys()):
            raise TypeError(f"report should be of a Clipper, or a dict with step and norm, not {report!r}")
        for name, value in values.items():
            if name in NAMES:
                raise ValueError(f"{name} is a name that the record uses itself: choose another")
            if not (value is None or isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ()):
                raise TypeError(f"{name} should be a number or an array of no dimensions, not {value!r}")
        if os.getpid() != self._process:  # a forked child is no rank, and has no thread
            return
        now = time.perf_counter()
        seconds = now - self._last_call if self._last_call else None
        self._last_call = now
        given = {name: value for name, value in values.items() if value is not None}
        held, self._held = self._held, _Step(report, given, time.time(), seconds)
        self._take(held)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._fail()

    def close(self) -> None:
        """Write the last step, wait for the disk (10 s at most) and end the thread. A second call does nothing."""
        if not self._closed and os.getpid() == self._process:
            held, self._held = self._held, None
            self._take(held)
            self._end(CLOSE_S)

    def _take(self, step: _Step | None) -> None:
        """Evaluate a step on every rank alike, as a lazy sum over ranks needs them all; rank 0 hands it on."""
        if step is None:
            return
        if not self._writes:
            mx.eval(getattr(step.report, "arrays", step.report), step.values)
            return
        found = step.evaluated()
        if self._live:
            self._live.show(found)
        self._count += 1
        if (self._count - 1) % self.every == 0 or not math.isfinite(found["norm"]):
            self._hand(found)

    def _hand(self, item: _Step | dict[str, Any]) -> None:
        try:
            self._queue.put((self._dropped, item), timeout=0 if self._full else WAIT_S)
            self._full, self._dropped = False, 0
        except queue.Full:
            self._full = True
            self._dropped += 1
            self._file.tell("slow", "takes lines too slowly: training goes on, and lines are dropped")

    def _fail(self) -> None:
        """End where the last step may wait for ranks that are gone: the thread looks at it, for a while."""
        if self._closed or os.getpid() != self._process:
            return
        held, self._held = self._held, None
        if held is not None and self._writes:
            self._hand(held)
        self._end(FAIL_S)

    def _end(self, limit_s: float) -> None:
        self._closed = True
        if not self._writes:
            return
        self._forget()
        if self._live:
            self._live.end()
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(queue.Full):
            self._queue.put((self._dropped, None), timeout=limit_s)
            self._thread.join(max(deadline - time.monotonic(), 0.05))
        if self._thread.is_alive():
            self._given_up = True  # the thread ends when the disk lets it go
            self._file.tell("end", f"did not take the last lines within {limit_s:g} s: they are lost")

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self._file.begin()
        while True:
            dropped, item = self._queue.get()
            if item is None or self._given_up:
                self._file.close(dropped)
                return
            try:
                self._file.write(item.evaluated() if isinstance(item, _Step) else item, dropped)
            except (
                Exception
            ) as error:  # no room, no disk, a report that waits for a rank that is gone: never the training
                self._file.lose(error)


class _File:
    """The file and TensorBoard's, used by the thread alone."""

    def __init__(self, path: Path, header: dict[str, Any], tensorboard: str | os.PathLike[str] | None):
        self._board: Any = sinks.board(tensorboard) if tensorboard is not None else None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lost, self._hosts, self._told = path, 0, None, set[str]()
        self._torn, self._header = _is_torn(path), header
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any], dropped: int) -> None:
        self._lost += dropped
        if self._board is not None:
            self._show(record)
        self.begin()
        hosts = record.get("rank_hosts")
        self._line({name: value for name, value in record.items() if name != "rank_hosts" or hosts != self._hosts})
        self._hosts = hosts  # said once

    def begin(self) -> None:
        """Write what must stand before the next line."""
        if self._header:
            self._line(self._header)
            self._header = {}
        if self._lost:
            self._line({"kind": "dropped", "steps": self._lost})
            self._lost = 0

    def lose(self, error: Exception) -> None:
        self._lost += 1
        self.tell("lost", f"cannot be written ({error}): training goes on, and lines are dropped")

    def close(self, dropped: int) -> None:
        self._lost += dropped
        with contextlib.suppress(OSError):
            self.begin()
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except Exception as error:
                self.tell("board", f"is whole, but TensorBoard's is not ({error})")

    def tell(self, what: str, text: str) -> None:
        """Once for each thing."""
        if what not in self._told:
            self._told.add(what)
            print(f"distclip: the record {self._path} {text}.", file=sys.stderr, flush=True)

    def _line(self, record: dict[str, Any]) -> None:
        text = json.dumps(strict(record), allow_nan=False, default=str, separators=(",", ":")) + "\n"
        rest = memoryview(text.encode() if not self._torn else b"\n" + text.encode())
        while rest:  # a disk that fills takes a part of a line
            written = self._file.write(rest)
            self._torn = written < len(rest)
            rest = rest[written:]

    def _show(self, record: dict[str, Any]) -> None:
        try:
            for name, value in sinks.flat(record):
                self._board.add_scalar(name, value, record["step"])
        except Exception as error:
            self._board = None
            self.tell("board", f"goes on without TensorBoard ({error})")


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line: its writer was killed, or its disk was full."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
