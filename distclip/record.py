"""One line per step in a file: what was clipped and why, written off the training path and read back for the report."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import queue
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from distclip.world import init

KIND, FORMAT = "distclip-record", 1
LINES = 1024  # that may wait for the disk
WAIT_S = 0.1  # that a step may wait once the lines are as many, before lines are dropped
CLOSE_S = 10.0  # that the end of a good run waits for the disk
FAIL_S = 1.0  # and that of a failed one
NAMES = {"kind", "norm", "threshold", "scale", "clipped", "finite", "skipped", "groups", "rank_norms", "rank_hosts"}
NAMES |= {"noise_scale", "time", "step_s"}


def on_terminal() -> bool:
    """Whether a person looks on: mpirun gives every rank a terminal of no size, and local.sh says what is behind."""
    return sys.stdout.isatty() and (os.get_terminal_size().columns > 0 or os.environ.get("DISTCLIP_TERMINAL") == "1")


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
        self._live = _Live(live_every) if live else None
        header = {"kind": KIND, "format": FORMAT, "distclip": version("distclip"), "mlx": version("mlx")}
        header |= {"ranks": world.size, "backend": world.backend, "host": socket.gethostname(), "every": every}
        header |= {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "config": dict(config or {})}
        self._file = _File(self.path, header, tensorboard)
        self._queue: queue.Queue[tuple[int, _Step | dict[str, Any] | None]] = queue.Queue(LINES)
        self._full, self._dropped, self._given_up = False, 0, False
        self._thread = threading.Thread(target=self._write, name="distclip-record", daemon=True)
        self._thread.start()
        _arrange_end(self, world.size)

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
        _open.discard(self)
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
        self._board: Any = _board(tensorboard) if tensorboard is not None else None
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
            for name, value in _flat(record):
                self._board.add_scalar(name, value, record["step"])
        except Exception as error:
            self._board = None
            self.tell("board", f"goes on without TensorBoard ({error})")


def _board(folder: str | os.PathLike[str]) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError(
            "Recorder(tensorboard=...) needs the package tensorboard: pip install 'distclip[tensorboard]'"
        ) from error
    return Writer(os.fspath(folder))


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if name in ("kind", "step", "time", "rank_hosts"):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", float(one)) for i, one in enumerate(value))
        else:
            yield f"{prefix}{name}", float(value)


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line: its writer was killed, or its disk was full."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class _Live:
    """The run in a line of rank 0's terminal."""

    def __init__(self, every: int):
        self.every, self.terminal = every, on_terminal()
        self.seen, self.clipped, self.skipped, self.shown_at = 0, 0, 0, 0.0
        self.values: dict[str, float] = {}
        self.text = ""

    def show(self, step: dict[str, Any]) -> None:
        self.seen += 1
        self.clipped += was_clipped(step)
        self.skipped += bool(step.get("skipped"))
        self.values |= {name: value for name, value in step.items() if name not in NAMES and name != "step"}
        threshold = step.get("threshold")
        values = self.values | {"norm": step["norm"]}
        values |= {"threshold": threshold} if isinstance(threshold, (int, float)) else {}
        shown = [f"step {step['step']}", *(f"{name} {value:.4g}" for name, value in values.items())]
        shown += [f"clipped {self.clipped / self.seen:.0%}", f"skipped {self.skipped}"]
        shown += [f"{step['step_s'] * 1e3:.3g} ms"] if "step_s" in step else []
        self.text = "  ".join(shown)
        if not self.terminal and (self.seen - 1) % self.every == 0:
            print(self.text, flush=True)
        elif self.terminal and time.monotonic() - self.shown_at > 0.1:  # more often than the eye can follow is slow
            self._print("")

    def end(self) -> None:
        if self.terminal and self.seen:
            self._print("\n")
        elif self.seen and (self.seen - 1) % self.every:
            print(self.text, flush=True)

    def _print(self, end: str) -> None:
        self.shown_at = time.monotonic()
        width = os.get_terminal_size().columns or 80
        print(f"\r{self.text[: width - 1]}\x1b[K", end=end, flush=True)


# A job that fails under mpirun ends by os._exit, which no atexit function sees; see distclip/world.py.
_open: weakref.WeakSet[Recorder] = weakref.WeakSet()
_arranged = False


def _arrange_end(recorder: Recorder, ranks: int) -> None:
    global _arranged
    _open.add(recorder)
    if not _arranged:
        _arranged = True
        atexit.register(_fail_all)
        if ranks > 1:
            sys.excepthook = _fail_first(sys.excepthook)


def _fail_all() -> None:
    for recorder in list(_open):
        recorder._fail()


def _fail_first(previous: Callable[..., Any]) -> Callable[..., Any]:
    def excepthook(*failure: Any) -> None:
        _fail_all()
        previous(*failure)

    return excepthook


# ------------------------------------------------------------------------------------------------- reading


@dataclass
class Records:
    """What a file holds.

    Attributes:
        steps (list of dict): in order of ``step``, each once.
        headers (list of dict): one for each time that the run was started.
        hosts (list of str): of the ranks, where it was recorded.
        dropped (int): how many steps the recorder could not write.
        damaged (list of (int, str)): lines that were left out, and why.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, Any]] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    dropped: int = 0
    damaged: list[tuple[int, str]] = field(default_factory=list)


def read_records(path: str | os.PathLike[str]) -> Records:
    """Read what a :class:`Recorder` wrote, cut off or damaged as it may be.

    A run that was resumed replaces what an earlier one had recorded from its first step on.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or no record, or one of a newer distclip.
    """
    found, resumed = Records(), False
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            try:
                record = _parsed(line)
            except ValueError as error:
                found.damaged.append((number, str(error)))
                if number == HOPELESS and not found.headers:
                    raise ValueError(f"{path} is no record of distclip") from None
                continue
            if record.get("kind") == KIND:
                if record["format"] > FORMAT:
                    raise ValueError(
                        f"{path} was written by a newer distclip ({record.get('distclip')}): update this one"
                    )
                found.headers.append(record)
                resumed = True
            elif record.get("kind") == "dropped":
                found.dropped += record["steps"]
            elif not found.headers and not found.damaged:
                raise ValueError(f"{path} is no record of distclip: it does not begin with a header")
            else:
                while resumed and found.steps and found.steps[-1]["step"] >= record["step"]:
                    found.steps.pop()
                resumed = False
                found.hosts = record.pop("rank_hosts", found.hosts)
                found.steps.append(record)
    if not found.headers and not found.steps:
        raise ValueError(f"{path} is empty" if not found.damaged else f"{path} is no record of distclip")
    found.steps = sorted({step["step"]: step for step in found.steps}.values(), key=lambda step: step["step"])
    return found


def was_clipped(step: Mapping[str, Any]) -> bool:
    """As the clipper said, or else by norm and threshold."""
    threshold = step.get("threshold", math.inf)
    return bool(step.get("clipped", not isinstance(threshold, dict) and threshold < step["norm"] < math.inf))


LONGEST, HOPELESS = 2**24, 100  # bytes in a line; lines at the start without a header


def _parsed(line: bytes) -> dict[str, Any]:
    """A whole line. Raises ValueError, which says what is wrong with another."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        raise ValueError("cut off" if not line.endswith(b"\n") else "not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a record")
    if "kind" in record:
        if not isinstance(record.get({KIND: "format", "dropped": "steps"}.get(str(record["kind"]), "")), int):
            raise ValueError("a record of an unknown kind")
        return record
    hosts = record.pop("rank_hosts", None)
    record = {name: _value(name, value) for name, value in record.items()}
    if type(record.get("step")) is not int or "norm" not in record:
        raise ValueError("no step and norm")
    return record if not isinstance(hosts, list) else record | {"rank_hosts": [str(host) for host in hosts]}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name in ("groups", "threshold", "scale"):
        return {key: _number(one) for key, one in value.items()}
    if name == "groups" or isinstance(value, list) != (name == "rank_norms"):
        raise ValueError(f"{name} is of the wrong kind")
    return [_number(one) for one in value] if isinstance(value, list) else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and abs(value) < 2**63:
        return value
    if isinstance(value, float) or value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError(f"{value!r} is no number")


def plain(found: Any) -> Any:
    """Arrays as Python numbers; mappings and lists of them too. Evaluates."""
    if isinstance(found, Mapping):
        return {str(name): plain(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return found.tolist() if hasattr(found, "tolist") else found


def strict(found: Any) -> Any:
    """The same with infinities and NaNs as text, which JSON has no numbers for."""
    if isinstance(found, dict):
        return {name: strict(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [strict(value) for value in found]
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found
