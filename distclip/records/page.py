"""The page of a report: a file of HTML without scripts that needs no network.

Its tables have a row for each run, and a row for each step that stands out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from distclip.records.columns import Column
from distclip.records.figure import color, svg
from distclip.records.panels import SPIKE, Panel, Run

STYLE = """
:root { color-scheme: light dark; --soft: #8884; --warn: #b00 }
@media (prefers-color-scheme: dark) { :root { --warn: #f77 } }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1000px; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 1.6rem 0 .2rem }
.warn { color: var(--warn) } div.wide { overflow-x: auto } pre { white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--soft); vertical-align: top }
svg { display: block; width: 100%; height: auto; overflow: visible; margin-top: 1.5rem }
svg text { fill: currentColor !important }
"""
STARTS = 20  # of a run, the last
LISTED = 50  # steps of a run, of those that were finite and of those that were not
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run], panels: list[Panel], notes: list[str]) -> str:
    """The whole page, every text of it escaped. The notes say what it does not show, in sentences."""
    title = escape(f"Gradient clipping: {', '.join(run.name for run in runs)}")
    colors = {run.name: color(run.number) for run in runs}
    rows, unlisted = events(runs)
    started = "".join(
        f"<details><summary>how {escape(run.name)} was started{_last_of(run.data.records.headers)}</summary>"
        f"<pre>{escape(json.dumps(run.data.records.headers[-STARTS:], indent=1))}</pre></details>"
        for run in runs
    )
    listed = f"<h2>Spikes, skipped steps and steps that were not finite</h2>{_table(rows, colors)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1>"
        + "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
        + _table(summary(runs), colors)
        + started
        + (svg(panels) if panels else "")
        + (listed if len(rows) > 1 else "")
        + "".join(f"<p>{escape(note)}</p>" for note in unlisted)
        + "</body></html>\n"
    )


def _last_of(headers: Sequence[object]) -> str:
    return f", the last {STARTS} of {len(headers):,} times" if len(headers) > STARTS else ""


def _table(table: list[list[str]], colors: dict[str, str]) -> str:
    """A row of headings, and rows whose first word is the name of a run."""
    heads, *rows = table
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = ""
    for name, *texts in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        body += f'<tr><th scope="row" style="color:{colors[name]}">{escape(name)}</th>{cells}</tr>\n'
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def left_out(run: Run) -> list[str]:
    """What the report does not show, in words."""
    notes = []
    records = run.data.records
    if records.damaged:
        lines = ", ".join(f"{number} ({why})" for number, why in records.damaged[:5])
        more = f" and {len(records.damaged) - 5} more" if len(records.damaged) > 5 else ""
        notes.append(f"{run.name}: damaged lines are left out: line {lines}{more}")
    if records.dropped:
        notes.append(f"{run.name}: {records.dropped} steps could not be written when they were recorded")
    if run.data.left_out:
        notes.append(f"{run.name}: {run.data.left_out:,} numbers are left out: there are too many names to draw")
    if not len(run.data):
        notes.append(f"{run.name}: it has a header, and no steps")
    return notes


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each run, under a row of headings."""
    heads = "run, steps, clipped, skipped, not finite, median norm, worst norm, median step, not recorded"
    return [[*heads.split(", "), "ranks to look at"], *(_summary(run) for run in runs)]


def _summary(run: Run) -> list[str]:
    if not len(run.data):
        return [run.name, "0", *["-"] * 8]
    steps, records = run.data.steps, run.data.records
    finite = np.isfinite(run.norms)
    worst = np.where(finite, run.norms, -math.inf).argmax()
    seconds = run.data.numbers["step_s"].values if "step_s" in run.data.numbers else ()
    suspects = run.suspects.sum(axis=0)
    ranks = np.argsort(-suspects, kind="stable")[:5].tolist()
    again = f", started {len(records.headers)} times" if len(records.headers) > 1 else ""
    return [
        run.name,
        f"{len(steps):,} ({steps[0]:,} to {steps[-1]:,}{again})",
        f"{run.clipped.mean():.1%}",
        f"{np.count_nonzero(run.skipped):,}",
        f"{np.count_nonzero(~finite):,}",
        f"{np.median(run.norms[finite]):.4g}" if finite.any() else "-",
        f"{run.norms[worst]:.4g} at step {steps[worst]:,}" if finite.any() else "-",
        f"{np.median(seconds) * 1e3:.3g} ms" if len(seconds) else "-",
        _missing(run),
        ", ".join(f"{run.rank(rank)}: {suspects[rank]:,} steps" for rank in ranks if suspects[rank]) or "none",
    ]


def _missing(run: Run) -> str:
    records = run.data.records
    every = records.headers[-1].get("every") if records.headers else 1
    gaps = np.count_nonzero(np.diff(run.data.steps) > every) if isinstance(every, int) else 0
    counts = {"dropped": records.dropped, "gaps": gaps, "damaged lines": len(records.damaged)}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing"


def events(runs: Sequence[Run]) -> tuple[list[list[str]], list[str]]:
    """The worst steps: rows under a row of headings, and notes on how many are not among them."""
    rows = [["run", "step", "norm", "threshold", "norm / threshold", "skipped", "loss", "ranks to look at"]]
    notes = []
    for run in runs:
        bad = np.isinf(run.factors)
        places = run.worst_first(bad | (run.factors >= SPIKE) | run.skipped)
        shown = np.sort(np.concatenate([places[bad[places]][:LISTED], places[~bad[places]][:LISTED]]))
        rows += [_event(run, int(place)) for place in shown]
        if len(places) > len(shown):
            notes.append(f"{run.name}: {len(places) - len(shown):,} more such steps are not listed")
    return rows, notes


def _event(run: Run, place: int) -> list[str]:
    factor, numbers = run.factors[place], run.data.numbers
    thresholds = [numbers["threshold"]] if "threshold" in numbers else run.data.tables["threshold"].values()
    return [
        run.name,
        f"{run.data.steps[place]:,}",
        f"{run.norms[place]:.6g}",
        ", ".join(filter(None, (_value(column, place) for column in thresholds))),
        f"{factor:.3g}" if math.isfinite(factor) else "",
        ("a spike" if run.spikes[place] else "yes") if run.skipped[place] else "",
        _value(numbers[run.loss], place) if run.loss else "",
        ", ".join(run.rank(int(rank)) for rank in np.flatnonzero(run.suspects[place])),
    ]


def _value(column: Column, place: int) -> str:
    """The value of a step in a column, or nothing."""
    values = column.values[slice(*np.searchsorted(column.places, [place, place + 1]))]
    return f"{values[0]:.6g}" if len(values) else ""
