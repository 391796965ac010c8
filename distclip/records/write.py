"""Record each step of a training: what was clipped and why, with the loss and other numbers."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distclip.arguments import whole
from distclip.records.background import Background, Once, Sink, end
from distclip.records.read import FORMAT, KIND, NAMES, strict
from distclip.records.sinks import File, Live
from distclip.records.tracked import Tracked, trackers_of
from distclip.records.trackers import TensorBoard
from distclip.world import World, init

CLOSE_S = 10.0  # the end of a good run waits for the disk, at most
FAIL_S = 1.0  # the end of a failed run


class Recorder:
    """Write what a :class:`distclip.Clipper` does to a file, one line of JSON per step, from rank 0.

    Call it on every rank, once a step, after the step is evaluated. A call evaluates the step of the call before, whose
    arrays are done by then, so recording waits for nothing; closing the recorder evaluates the last step. The other
    ranks evaluate with rank 0 and write nothing. A thread writes each line and hands it to the system at once, so a job
    that is killed loses the line of the last step at most.

        with dc.Recorder("runs/a.jsonl", config={"lr": 1e-3}) as record:
            for batch in batches:
                ...
                record(report, loss=loss)

    A disk that is slow, full or gone never ends the training: lines that cannot be written are dropped and counted in
    the file, with one message on rank 0's standard error. Each tracker has a thread of its own, and the same holds.

    Args:
        path (path or None): the file; a run that goes on appends to it. Its folder is made. None writes no file: the
            live line and trackers work without one.
        every (int): write each ``every``-th step, and every step that was skipped or whose norm was not finite.
        config (dict, optional): goes into the header, and to trackers; values that JSON cannot hold go as their text.
        sinks (list): trackers that get the same steps: names (``"wandb"``, ``"swanlab"``, ``"mlflow"``,
            ``"tensorboard"``), objects of :mod:`distclip.records.trackers` with options, functions that are called
            with ``(numbers, step)``, or objects with ``start(config)``, ``log(numbers, step)`` and ``finish(status)``,
            where status is ``"finished"`` or ``"failed"``. ``numbers`` is a dict of floats; the norm is ``grad_norm``.
        tensorboard (path, optional): a folder for TensorBoard, as ``sinks=[TensorBoard(path)]``.
        live (bool): show the steps on rank 0's standard output: on a terminal a line that changes, else a line every
            ``live_every`` steps.
        steps (int, optional): the last step of the run: the live line says ``step 12/300``, behind a bar on a terminal.

    Raises:
        OSError: the file cannot be opened, or another program is writing it.
        ImportError: on rank 0: the package of a tracker is not installed.
        TypeError, ValueError: a sink is none of these.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        every: int = 1,
        config: Mapping[str, Any] | None = None,
        sinks: Any = (),
        tensorboard: str | os.PathLike[str] | None = None,
        live: bool = False,
        live_every: int = 10,
        steps: int | None = None,
    ) -> None:
        every, live_every = whole("every", every, 1), whole("live_every", live_every, 1)
        steps = None if steps is None else whole("steps", steps, 1)
        world = init()
        self.path, self.every = None if path is None else Path(path), every
        self._process, self._closed = os.getpid(), False
        self._step: Callable[[], dict[str, Any]] | None = None  # of the last call, not evaluated yet
        self._last_call, self._count = 0.0, 0
        trackers = trackers_of(sinks) + ([] if tensorboard is None else [TensorBoard(tensorboard)])
        self._trackers: list[Tracked] = []
        writing: list[Sink] = []
        if world.rank == 0:
            header = _header(world, every, config or {})
            self._trackers = [Tracked(tracker, _settings(header)) for tracker in trackers]
            writing = [*([File(self.path, header)] if self.path else []), *self._trackers]
        self._backgrounds = [Background(sink) for sink in writing]
        self._live = Live(live_every, steps) if live and world.rank == 0 else None
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
            raise ValueError("This recorder is closed")
        _check(report, values)
        if not self._is_open():
            return
        for tracker in self._trackers if self._step is None else ():
            tracker.find_run()
        now = time.perf_counter()
        seconds = now - self._last_call if self._last_call else None
        self._last_call = now
        self._take(partial(_evaluated, report, values, time.time(), seconds))

    def __repr__(self) -> str:
        return f"Recorder({str(self.path)!r}, every={self.every})" if self.path else f"Recorder(every={self.every})"

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close()
        elif isinstance(error, SystemExit) and not error.code:
            self._fail("finished", CLOSE_S)
        else:
            self._fail("failed")

    def flush(self) -> None:
        """Write the last step, and wait until it is on the disk (10 s at most): a run that goes on from a checkpoint
        which is saved after this lacks no step. Call it on every rank. The last step must be evaluated."""
        if self._is_open():
            self._take(None)
            deadline = time.monotonic() + CLOSE_S
            for background in self._backgrounds:
                background.flush(max(deadline - time.monotonic(), 0.05))

    def close(self) -> None:
        """Write the last step, wait for the disk (10 s at most) and end the thread. A second call does nothing."""
        if self._is_open():
            self._take(None)
            self._end("finished", CLOSE_S)

    def _is_open(self) -> bool:
        """Not closed, and no forked child, which is no rank and has no thread."""
        return not self._closed and os.getpid() == self._process

    def _take(self, following: Callable[[], dict[str, Any]] | None) -> None:
        """Evaluate the held step on every rank, since a lazy sum over ranks needs them all; rank 0 writes it."""
        step, self._step = self._step, following
        if step is None:
            return
        record = step()
        if self._live:
            self._live.show(record)
        bad = record.get("skipped") or not math.isfinite(record["norm"])
        if self._count % self.every == 0 or bad:
            self._put(lambda: record)
        self._count += 1

    def _put(self, record: Callable[[], dict[str, Any]]) -> None:
        for background in self._backgrounds:
            background.put(record)

    def _fail(self, status: str = "", limit_s: float = FAIL_S) -> None:
        """End a run that failed, that closed nothing, or that ended by ``sys.exit``. The last step may wait for ranks
        that are gone, so a thread evaluates it."""
        if self._is_open():
            if self._step:
                self._put(Once(self._step))
            raised = getattr(sys, "last_value", None) is not None  # Python sets it for an uncaught exception
            self._end(status or ("failed" if raised else "finished"), limit_s)

    def _end(self, status: str, limit_s: float) -> None:
        self._closed, self._step = True, None
        self._forget()
        if self._live:
            self._live.end()
        end(self._backgrounds, status, limit_s)


def _evaluated(report: Any, values: dict[str, Any], called: float, seconds: float | None) -> dict[str, Any]:
    """The record of a call, with the time of the call and the seconds since the call before."""
    record: dict[str, Any] = plain(report.to_dict() if hasattr(report, "to_dict") else report)
    record |= plain({name: value for name, value in values.items() if value is not None})
    record["time"] = round(called, 3)
    return record if seconds is None else record | {"step_s": round(seconds, 6)}


def _check(report: Any, values: dict[str, Any]) -> None:
    if not hasattr(report, "to_dict") and not (isinstance(report, Mapping) and {"step", "norm"} <= report.keys()):
        raise TypeError(f"report should be of a Clipper, or a dict with step and norm, not {report!r}")
    for name, value in values.items():
        if name in NAMES:
            raise ValueError(f"{name} is a name that the record uses itself: choose another")
        if not (value is None or isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ()):
            raise TypeError(f"{name} should be a number or an array of no dimensions, not {value!r}")


def _header(world: World, every: int, config: Mapping[str, Any]) -> dict[str, Any]:
    header = {"kind": KIND, "format": FORMAT, "distclip": version("distclip"), "mlx": version("mlx")}
    header |= {"ranks": world.size, "backend": world.backend, "host": socket.gethostname(), "every": every}
    return header | {"started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "config": dict(config)}


def _settings(header: dict[str, Any]) -> dict[str, Any]:
    """What trackers keep of a header: the run's configuration, and where it runs, as JSON has it."""
    where = {name: header[name] for name in ("distclip", "mlx", "ranks", "backend", "host")}
    return dict(json.loads(json.dumps(strict(where | header["config"]), default=str)))


def plain(value: Any) -> Any:
    """Arrays as Python numbers; mappings and lists of them too. Evaluates."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
