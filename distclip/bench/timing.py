"""Time contestants in turns, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import mlx.core as mx

PAUSE_S = 0.003  # threads of a pool spin for a while after its work, and would take a core from the next contestant

Work = Callable[[list[Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Contestant:
    """A library that does the work of a case.

    Attributes:
        name (str): as the table shows it.
        fresh: makes the gradients of a round, outside the timing.
        work: what is timed, until its result is evaluated. It gets a list that alone holds the gradients, and pops them
            to give them up. Returns its results and the norm, or None if it computes none.
        floor (bool): it only reads or copies as many bytes, to compare with.
    """

    name: str
    fresh: Callable[[], Any]
    work: Work
    floor: bool = False


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
    contestants: list[Contestant], rounds: int, truth: float | None, group: mx.distributed.Group | None = None
) -> list[Series]:
    """Time every contestant once a round. Each round starts with the next contestant; the first does not count.

    Args:
        truth: the norm in float64.
        group: all its ranks take part and begin each turn together. A turn takes as long as on the slowest rank.
    """
    all_series = [Series(contestant.name, contestant.floor) for contestant in contestants]
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for i in range(len(contestants)):
                i = (i + turn) % len(contestants)
                seconds, norm = _time(contestants[i], group)
                if turn > 0:
                    all_series[i].seconds.append(seconds)
                all_series[i].norm = norm
    finally:
        if collects:
            gc.enable()
    for series in all_series:
        if group is not None:
            series.seconds = _slowest(series.seconds, group)
        if series.norm is not None and truth is not None:
            series.error = abs(series.norm - truth) / truth
    return all_series


def eager_and_compiled(
    name: str, function: Callable[[Any], tuple[Any, Any]], fresh: Callable[[], Any], given_up: bool = True
) -> list[Contestant]:
    """A function of gradients as it is, and compiled by MLX. It returns its results and the norm."""
    return [
        Contestant(name, fresh, work_of(function, given_up)),
        Contestant(f"{name}, compiled", fresh, work_of(mx.compile(function), given_up)),
    ]


def work_of(function: Callable[[Any], tuple[Any, Any]], given_up: bool = True) -> Work:
    """Call a function of gradients, and evaluate what it returns."""

    def work(box: list[Any]) -> tuple[Any, Any]:
        results = function(box.pop() if given_up else box[0])
        mx.eval(results)
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


def _slowest(seconds: list[float], group: mx.distributed.Group) -> list[float]:
    gathered = mx.distributed.all_gather(mx.array([seconds]), group=group)
    return mx.max(gathered, axis=0).tolist()  # type: ignore[return-value]
