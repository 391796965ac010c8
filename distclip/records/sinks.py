"""Where records go: a line on the terminal, and a file of JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from distclip.lock import DYING_S, Lock, describe
from distclip.records.read import NAMES, strict, was_clipped
from distclip.terminal import on_terminal

WAIT_S = 0.1  # that a step waits when the disk is slow, before lines are dropped


class File:
    """A file that gets a header, then a line for each record, each handed to the system at once.

    Raises:
        OSError: it cannot be opened, or another program is writing it.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_of(path)
        self.name, self.lost = f"the record {path}", 0  # records that the file lacks and does not mention yet
        self.wait_s = WAIT_S
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

    def close(self, status: str) -> None:
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
