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


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case.

    Attributes:
        name (str): as the table shows it.
        fresh: makes the gradients of one round, outside the timing.
        work: what is timed, until its result is there. It gets a list that alone holds the gradients, and takes them
            out to give them up. Returns its results and the norm it found (None: it finds none).
        floor (bool): not a way to do the work, but a simple act on as many bytes, to compare with.
    """

    name: str
    fresh: Callable[[], Any]
    work: Callable[[list[Any]], tuple[Any, Any]]
    floor: bool = False


@dataclass
class Series:
    """What was measured of one contestant."""

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
    """One case: all contestants on one tree. The first that is no floor is distclip."""

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
        return next(one.median for one in self.series if not one.floor)


def interleave(
    contestants: list[Contestant], rounds: int, truth: float | None, group: mx.distributed.Group | None = None
) -> list[Series]:
    """Every contestant once a round, each round from another one on, after a round that does not count.

    Args:
        truth: the norm in float64.
        group: all its ranks take part, begin each step together, and a step takes as long as on the slowest.
    """
    found = [Series(one.name, one.floor) for one in contestants]
    collected = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for i in range(len(contestants)):
                i = (i + turn) % len(contestants)
                seconds, norm = _once(contestants[i], group)
                if turn > 0:
                    found[i].seconds.append(seconds)
                found[i].norm = norm
    finally:
        if collected:
            gc.enable()
    for series in found:
        if group is not None:
            series.seconds = _slowest(series.seconds, group)
        if series.norm is not None and truth is not None:
            series.error = abs(series.norm - truth) / truth
    return found


def _once(contestant: Contestant, group: mx.distributed.Group | None) -> tuple[float, float | None]:
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
    told = mx.distributed.all_gather(mx.array([seconds]), group=group)
    return mx.max(told, axis=0).tolist()  # type: ignore[return-value]
