"""Time contestants in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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


@dataclass
class Series:
    """The measurements of a contestant."""

    name: str
    floor: bool
    seconds: list[float] = field(default_factory=list)
    norm: float | None = None
    error: float | None = None  # relative, of the norm against float64

    @property
    def median(self) -> float:
        return median(self.seconds)


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
                seconds, series.norm = _time(contestant, group)
                if i > 0:
                    series.seconds.append(seconds)
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
        contestants.append(Contestant(name, fresh, work_of(function, given_up)))
        contestants.append(Contestant(f"{name}, compiled", fresh, work_of(mx.compile(function), given_up)))
    return contestants


def work_of(function: Function, given_up: bool = True, evaluate: Callable[[Any], Any] = mx.eval) -> Work:
    """Call a function of gradients, and evaluate what it returns."""

    def work(box: list[Any]) -> tuple[Any, Any]:
        results = function(box.pop() if given_up else box[0])
        evaluate(results)
        return results

    return work


def _time(contestant: Contestant, group: mx.distributed.Group | None) -> tuple[float, float | None]:
    box = [contestant.fresh()]
    time.sleep(PAUSE_S)
    if group is not None:
        mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
    begin = time.perf_counter()
    results, norm = contestant.work(box)
    seconds = time.perf_counter() - begin
    del results
    return seconds, None if norm is None else float(norm)
