"""What a report draws and lists: curves, heat maps, spikes and skipped steps, out of the columns of each run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from distclip.records.columns import Column, Columns, Numbers
from distclip.records.read import NAMES

WINDOW = 50  # steps over which the shares of clipped and skipped steps are taken
SPIKE = 3.0  # a norm of 3 thresholds is marked and listed
FAR = 5.0  # a rank whose norm is more than 5 times the ranks' median is named
COLUMNS = 500  # a line is thinned to the least and the greatest value of each; also of a heat map
ROWS = 40  # of a heat map: the largest
CHUNK = 65_536  # steps whose ranks are compared at once


@dataclass
class Line:
    """A curve of a run, thinned. Values that are not finite stay in it."""

    run: int  # which of the runs
    label: str
    xs: Numbers
    ys: Numbers
    dash: int = 0  # which of the styles


@dataclass
class Mark:
    """A step that the norm's panel marks."""

    run: int
    step: int
    y: float  # not finite: drawn on the upper edge


@dataclass
class Panel:
    """A picture among others: curves with marks, or a heat map."""

    title: str
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    log: bool = False
    rows: list[str] = field(default_factory=list)  # of a heat map
    cells: Numbers = field(default_factory=lambda: np.empty((0, 0)))  # NaN: no step; infinite: not finite
    extent: tuple[int, int] = (0, 1)  # first step of a heat map, and the one behind its last
    scale: tuple[float, float] | None = None  # of the colours, where several heat maps share it
    span: tuple[int, int] = (0, 1)  # first and last step of all panels


@dataclass
class Run:
    """A record and what the report works out of it."""

    name: str
    number: int
    data: Columns

    def __post_init__(self) -> None:
        self.norms = self.data.get("norm", math.nan)
        self.skipped = self.data.get("skipped", 0.0) != 0
        self.spikes = self.data.get("spike", 0.0) != 0
        self.loss = next((name for name in self.data.numbers if "loss" in name), None)

    @cached_property
    def clipped(self) -> Numbers:
        """By the clipper's report, or else by norm and threshold."""
        by_norm = (self.data.get("threshold", math.inf) < self.norms) & (self.norms < math.inf)
        reported = self.data.get("clipped", math.nan)
        return np.where(np.isnan(reported), by_norm, reported != 0)

    @cached_property
    def factors(self) -> Numbers:
        """How many thresholds each norm was, with a threshold per group the most; infinite if it was not finite."""
        factors = np.ones(len(self.data))
        for column in self.data.tables["scale"].values():
            good = column.values > 0
            places = column.places[good]
            factors[places] = np.maximum(factors[places], 1 / column.values[good])
        threshold = self.data.get("threshold", math.nan)
        with np.errstate(all="ignore"):
            factors = np.where(threshold > 0, np.minimum(self.norms / threshold, np.finfo(float).max), factors)
        return np.where(np.isfinite(self.norms), factors, math.inf)

    @cached_property
    def large(self) -> Numbers:
        """Whether a norm was finite, and many thresholds."""
        return np.isfinite(self.factors) & (self.factors >= SPIKE)

    @cached_property
    def suspects(self) -> Numbers:
        """Whether a rank's own norm was not finite, or far above the others': bool, shape (steps, ranks)."""
        table = self.data.tables["rank_norms"]
        suspects = np.zeros((len(self.data), max(table, default=-1) + 1), bool)
        for start in range(0, len(self.data) if table else 0, CHUNK):
            norms = np.full(suspects[start : start + CHUNK].shape, math.nan)  # where a rank has no norm
            for rank, column in table.items():
                part = slice(*np.searchsorted(column.places, [start, start + CHUNK]))
                values = column.values[part]
                norms[column.places[part] - start, rank] = np.where(np.isfinite(values), values, math.inf)
            count = np.isfinite(norms).sum(axis=1)
            median = np.sort(norms, axis=1)[np.arange(len(norms)), np.maximum(count - 1, 0) // 2]  # the lower
            limit = np.where(count > 1, FAR * median, math.inf)
            suspects[start : start + CHUNK] = np.isinf(norms) | (norms > limit[:, None])
        return suspects

    def worst_first(self, flags: Numbers) -> Numbers:
        """The places that are flagged, in the order of their norms over the threshold, from the greatest down."""
        places = np.flatnonzero(flags)
        return places[np.argsort(-self.factors[places], kind="stable")]

    @cached_property
    def suspected(self) -> list[tuple[int, int]]:
        """The ranks to look at, each with the number of such steps, the most first."""
        counts = self.suspects.sum(axis=0)
        return [(rank, int(counts[rank])) for rank in np.argsort(-counts, kind="stable").tolist() if counts[rank]]

    def rank(self, rank: int) -> str:
        hosts = self.data.records.hosts
        return f"rank {rank}" + (f" on {hosts[rank]}" if rank < len(hosts) else "")


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """What there is to draw of the runs, from the loss down."""
    extras = list(dict.fromkeys(name for run in runs for name in run.data.numbers if name not in NAMES))
    losses = [name for name in extras if "loss" in name or name.startswith("val")]
    norms = _curves(runs, "gradient norm before clipping, and threshold", ["norm", "threshold"], log=True)
    norms.marks = [mark for run in runs for mark in marks_of(run)]
    panels = [_curves(runs, ", ".join(losses), losses), norms, _shares(runs)]
    panels += _alike([panel for run in runs for panel in _heat(run, "groups", "group norms", str)])
    panels += _alike([panel for run in runs for panel in _heat(run, "rank_norms", "norms of the ranks", run.rank)])
    panels.append(_curves(runs, "gradient noise scale (rows of a batch; where above 0)", ["noise_scale"], log=True))
    panels.append(_curves(runs, "time of a step (s)", ["step_s"], log=True))
    panels += [_curves(runs, name, [name]) for name in extras if name not in losses]
    steps = np.concatenate([run.data.steps[[0, -1]] for run in runs if len(run.data)] or [np.zeros(1, int)])
    for panel in panels:
        panel.span = (int(steps.min()), int(max(steps.max(), steps.min() + 1)))
    return [panel for panel in panels if panel.lines or panel.rows]


def _curves(runs: Sequence[Run], title: str, names: list[str], *, log: bool = False) -> Panel:
    panel = Panel(title)
    for run in runs:
        for dash, name in enumerate(names):
            column = run.data.numbers.get(name, Column())
            if len(column.places):
                points = thinned(run.data.steps[column.places], column.values)
                panel.lines.append(Line(run.number, f"{run.name}: {name}", *points, dash % 4))
    values = np.concatenate([line.ys for line in panel.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    panel.log = (log and bool((values > 0).any())) or (len(values) > 0 and bool(0 < 20 * values.min() < values.max()))
    return panel


def thinned(xs: Numbers, ys: Numbers) -> tuple[Numbers, Numbers]:
    """The least, the greatest and a value that is not finite of each column: no spike is lost."""
    if len(xs) <= 2 * COLUMNS:
        return xs, ys
    size = math.ceil(len(xs) / COLUMNS)
    columns = np.append(ys, np.repeat(ys[-1], -len(xs) % size)).reshape(-1, size)
    finite = np.isfinite(columns)
    least = np.where(finite, columns, math.inf).argmin(axis=1)
    greatest = np.where(finite, columns, -math.inf).argmax(axis=1)
    bad = np.where(finite.all(axis=1), least, finite.argmin(axis=1))
    kept = np.unique(np.minimum(np.arange(len(columns)) * size + [least, greatest, bad], len(xs) - 1))
    return xs[kept], ys[kept]


def marks_of(run: Run) -> list[Mark]:
    """The worst step of each column whose norm was a spike, and of each whose norm was not finite."""
    size = max(math.ceil(len(run.data) / COLUMNS), 1)
    marks = []
    for kind in (run.large, np.isinf(run.factors)):
        places = run.worst_first(kind)
        worst = np.sort(places[np.unique(places // size, return_index=True)[1]])
        marks += [Mark(run.number, int(run.data.steps[place]), float(run.norms[place])) for place in worst]
    return marks


def _shares(runs: Sequence[Run]) -> Panel:
    panel = Panel(f"clipped and skipped, % of {WINDOW} recorded steps")
    for run in runs:
        total = np.cumsum([run.clipped, run.skipped], axis=1)
        counts = np.minimum(np.arange(1, len(run.data) + 1), WINDOW)
        total[:, WINDOW:] -= total[:, :-WINDOW].copy()
        for dash, (name, share) in enumerate(zip(("clipped", "skipped"), 100 * total / counts, strict=True)):
            if len(share) and (name == "clipped" or run.skipped.any()):
                panel.lines.append(Line(run.number, f"{run.name}: {name}", *thinned(run.data.steps, share), dash))
    return panel


def _heat(run: Run, key: str, title: str, name: Callable[[Any], str]) -> list[Panel]:
    """The greatest norm of each row and column; a column with a value that is not finite is infinite."""
    table = {row: column for row, column in run.data.tables[key].items() if len(column.places)}
    if not table:
        return []
    ends = [int(run.data.steps[place]) for column in table.values() for place in column.places[[0, -1]]]
    first, last = min(ends), max(ends)
    count = min(last - first + 1, COLUMNS, max(len(column.places) for column in table.values()))
    cells = np.full((len(table), count), math.nan)
    for row, column in zip(cells, table.values(), strict=True):
        places = (run.data.steps[column.places] - first) * count // (last - first + 1)
        np.fmax.at(row, places, np.where(np.isfinite(column.values), column.values, math.inf))
    largest = np.argsort(-np.max(cells, axis=1, where=np.isfinite(cells), initial=0.0), kind="stable")
    shown = np.sort(largest[:ROWS])
    rows = [name(list(table)[row]) for row in shown]
    if len(table) > ROWS:
        title += f", the {ROWS} largest of {len(table)}"
    return [Panel(f"{title}: {run.name}", log=True, rows=rows, cells=cells[shown], extent=(first, last + 1))]


def _alike(panels: list[Panel]) -> list[Panel]:
    """Heat maps of several runs, with the same colours for the same norms."""
    values = np.concatenate([panel.cells.ravel() for panel in panels] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    for panel in panels:
        panel.scale = (float(values.min()), float(values.max())) if len(values) else None
    return panels
