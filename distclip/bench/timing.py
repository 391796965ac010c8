"""Time contestants in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx

PAUSE_S = 0.003  # threads of a pool spin for a while after its work, and would take a core from the next contestant

Fresh = Callable[[], Any]  # makes the gradients of a round, outside the timing
Function = Callable[[Any], tuple[Any, Any]]  # of gradients; returns its results and the norm, None if it has none
Work = Callable[[list[Any]], tuple[Any, Any]]  # the same, of a list that alone holds them: it pops them to give them up


@dataclass(frozen=True)
class Contestant:
    """A library that does the work of a case."""

    name: str
    fresh: Fresh
    work: Work  # what is timed, until its result is evaluated
    floor: bool = False  # it only reads or copies as many bytes, to compare with
    mlx: bool = False  # its arrays are MLX's, which counts their memory
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # what its work is done in, such as an engine


@dataclass
class Series:
    """The measurements of a contestant."""

    name: str
    floor: bool
    seconds: list[float] = field(default_factory=list)
    norm: float | None = None
    error: float | None = None  # relative, of the norm against float64
    peak_bytes: int | None = None  # of MLX's memory, above what it held before the work

    @property
    def median(self) -> float:
        return median(self.seconds)

    def add(self, turn: Turn) -> None:
        self.seconds.append(turn.seconds)
        self.norm = turn.norm
        if turn.peak_bytes is not None:
            self.peak_bytes = max(turn.peak_bytes, self.peak_bytes or 0)


class Turn(NamedTuple):
    """What is measured when a contestant has its turn."""

    seconds: float
    norm: float | None
    peak_bytes: int | None


@dataclass
class Result:
    """A case: all contestants on one tree. The first that is no floor is distclip."""

    part: str
    case: str
    tree: str
    dtype: str
    bytes: int  # of gradient, on one rank
    values: int
    series: list[Series]
    shares: dict[str, float] = field(default_factory=dict)
    whole: str = "the step"  # that they are shares of

    @property
    def baseline(self) -> float:
        return next(series.median for series in self.series if not series.floor)


def interleave(
    contestants: list[Contestant], rounds: int, truth: float | None = None, group: mx.distributed.Group | None = None
) -> list[Series]:
    """Time every contestant once a round. Each round starts with the next contestant; the first does not count.

    Args:
        truth: the norm in float64.
        group: all its ranks take part and begin each turn together. A turn takes as long as on the slowest rank.
    """
    all_series = [Series(contestant.name, contestant.floor) for contestant in contestants]
    turns = deque(zip(contestants, all_series, strict=True))
    gc.disable()
    try:
        for i in range(rounds + 1):
            for contestant, series in turns:
                turn = _take_turn(contestant, group)
                if i > 0:
                    series.add(turn)
            turns.rotate(-1)
    finally:
        gc.enable()
    for series in all_series:
        if group is not None:
            gathered = mx.distributed.all_gather(mx.array([series.seconds]), group=group)
            series.seconds = mx.max(gathered, axis=0).tolist()  # type: ignore[assignment]
        if series.norm is not None and truth is not None:
            series.error = abs(series.norm - truth) / truth
    return all_series


def eager_and_compiled(functions: dict[str, Function], fresh: Fresh, given_up: bool = True) -> list[Contestant]:
    """Each function of MLX arrays as it is, and compiled by MLX."""
    contestants = []
    for name, function in functions.items():
        for label, variant in ((name, function), (f"{name}, compiled", mx.compile(function))):
            contestants.append(Contestant(label, fresh, work_of(variant, given_up), mlx=True))
    return contestants


def work_of(function: Function, given_up: bool = True, evaluate: Callable[[Any], Any] = mx.eval) -> Work:
    """Call a function of gradients, and evaluate what it returns."""

    def work(box: list[Any]) -> tuple[Any, Any]:
        results = function(box.pop() if given_up else box[0])
        evaluate(results)
        return results

    return work


def settle() -> None:
    """Wait until the host and the device are idle: what a contestant has left behind is in nobody's time."""
    for device in (mx.cpu, mx.default_device()):
        mx.synchronize(mx.default_stream(device))


def _take_turn(contestant: Contestant, group: mx.distributed.Group | None) -> Turn:
    box = [contestant.fresh()]
    with contestant.around():
        time.sleep(PAUSE_S)
        settle()
        if group is not None:
            mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        begin = time.perf_counter()
        results, norm = contestant.work(box)
        if contestant.mlx:
            settle()
        seconds = time.perf_counter() - begin
        peak = max(mx.get_peak_memory() - held, 0) if contestant.mlx else None
    del results
    return Turn(seconds, None if norm is None else float(norm), peak)
