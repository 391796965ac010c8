"""The tables of a report: a row for each run, and a row for each step that stands out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distclip.records.panels import SPIKE, Run
from distclip.records.read import Records

LISTED = 50  # steps of a run, of those that were finite and of those that were not


def left_out(records: Records, steps: int) -> list[str]:
    """What the report does not show, in words."""
    notes = []
    if records.damaged:
        first = ", ".join(f"{number} ({why})" for number, why in records.damaged[:5])
        more = f" and {len(records.damaged) - 5} more" if len(records.damaged) > 5 else ""
        notes.append(f"damaged lines are left out: line {first}{more}")
    if records.dropped:
        notes.append(f"{records.dropped} steps could not be written when they were recorded")
    if not steps:
        notes.append("it has a header, and no steps")
    return notes


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each run, under a row of headings."""
    heads = ["run", "steps", "clipped", "skipped", "not finite", "median norm", "worst norm", "median step"]
    heads += ["not recorded", "ranks to look at"]
    return [heads, *(_summary(run) for run in runs)]


def _summary(run: Run) -> list[str]:
    if not len(run.data):
        return [run.name, "0", *["-"] * 8]
    steps, records = run.data.steps, run.data.records
    finite = np.flatnonzero(np.isfinite(run.norms))
    worst = finite[run.norms[finite].argmax()] if len(finite) else None
    seconds = run.data.numbers["step_s"].values if "step_s" in run.data.numbers else ()
    again = f", started {len(records.headers)} times" if len(records.headers) > 1 else ""
    return [
        run.name,
        f"{len(steps):,} ({steps[0]:,} to {steps[-1]:,}{again})",
        f"{run.clipped.mean():.1%}",
        f"{np.count_nonzero(run.skipped):,}",
        f"{len(steps) - len(finite):,}",
        f"{np.median(run.norms[finite]):.4g}" if len(finite) else "-",
        f"{run.norms[worst]:.4g} at step {steps[worst]:,}" if worst is not None else "-",
        f"{np.median(seconds) * 1e3:.3g} ms" if len(seconds) else "-",
        _missing(run),
        _suspects(run),
    ]


def _missing(run: Run) -> str:
    records = run.data.records
    every = records.headers[-1].get("every") if records.headers else 1
    gaps = np.count_nonzero(np.diff(run.data.steps) > every) if isinstance(every, int) else 0
    missing = [f"{records.dropped} dropped"] * bool(records.dropped) + [f"{gaps} gaps"] * bool(gaps)
    return ", ".join(missing + [f"{len(records.damaged)} damaged lines"] * bool(records.damaged)) or "nothing"


def _suspects(run: Run) -> str:
    counts = run.suspects.sum(axis=0)
    most = [rank for rank in np.argsort(-counts, kind="stable")[:5].tolist() if counts[rank]]
    return ", ".join(f"{run.rank(rank)}: {counts[rank]:,} steps" for rank in most) or "none"


def events(runs: Sequence[Run]) -> tuple[list[list[str]], list[str]]:
    """The steps that were far above the threshold, skipped or not finite, the worst of each run: rows under a row of
    headings, and notes on what is not among them.
    """
    rows = [["run", "step", "norm", "threshold", "norm / threshold", "skipped", "loss", "ranks to look at"]]
    notes = []
    for run in runs:
        bad = np.isinf(run.factors)
        places = np.flatnonzero(bad | (run.factors >= SPIKE) | run.skipped)
        places = places[np.argsort(-run.factors[places], kind="stable")]
        shown = np.sort(np.concatenate([places[bad[places]][:LISTED], places[~bad[places]][:LISTED]]))
        rows += [_event(run, int(place)) for place in shown]
        if len(places) > len(shown):
            notes.append(f"{run.name}: {len(places) - len(shown):,} more such steps are not listed")
    return rows, notes


def _event(run: Run, place: int) -> list[str]:
    factor = run.factors[place]
    thresholds = [_value(column, place) for column in run.data.tables.get("threshold", {}).values()]
    numbers = run.data.numbers
    return [
        run.name,
        f"{run.data.steps[place]:,}",
        f"{run.norms[place]:.6g}",
        _value(numbers.get("threshold"), place) if "threshold" in numbers else ", ".join(filter(None, thresholds)),
        f"{factor:.3g}" if math.isfinite(factor) else "",
        "yes" if run.skipped[place] else "",
        _value(numbers.get(run.loss or ""), place),
        ", ".join(run.rank(int(rank)) for rank in np.flatnonzero(run.suspects[place])),
    ]


def _value(column: Any, place: int) -> str:
    """The value of a step in a column, or nothing."""
    if column is None:
        return ""
    at = int(np.searchsorted(column.places, place))
    return f"{column.values[at]:.6g}" if at < len(column.places) and column.places[at] == place else ""
