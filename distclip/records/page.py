"""The page of a report: a file of HTML without scripts that needs no network.

First what stood out, then a table with a column for each run, then the picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from distclip.records.columns import Column, Numbers
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
td { white-space: nowrap } ul { padding-left: 1.2rem } summary { cursor: pointer }
svg { display: block; width: 100%; min-width: 760px; height: auto; margin-top: 1.5rem }
svg text { fill: currentColor !important }
"""
STARTS = 20  # of a run, the last
OPEN = 10  # rows of steps that are shown without a click
NAMED = 5  # steps and ranks that a sentence names
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
    listed = f"<details{' open' * (len(rows) <= OPEN)}><summary>these steps, one by one</summary>{_table(rows, colors)}"
    listed += "".join(f"<p>{escape(note)}</p>" for note in unlisted) + "</details>"
    wrong = "".join(
        f'<li><b style="color:{colors[run.name]}">{escape(run.name)}</b>: {escape("; ".join(stood_out(run)))}</li>'
        for run in runs
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1>"
        + "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
        + f"<h2>What stood out</h2><ul>{wrong}</ul>"
        + (listed if len(rows) > 1 else "")
        + "<h2>The runs</h2>"
        + _side_by_side(summary(runs), [color(run.number) for run in runs])
        + started
        + (f'<div class="wide">{svg(panels)}</div>' if panels else "")
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


def _side_by_side(table: list[list[str]], colors: list[str]) -> str:
    """The same rows as columns: a run beside the other, under its name."""
    names, *rows = zip(*table, strict=True)
    heads = zip(names[1:], colors, strict=True)
    head = "".join(f'<th scope="col" style="color:{color}">{escape(name)}</th>' for name, color in heads)
    body = ""
    for name, *texts in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    return f'<div class="wide"><table><tr><th>{escape(names[0])}</th>{head}</tr>\n{body}</table></div>'


def stood_out(run: Run) -> list[str]:
    """What was wrong with a run, the worst first, in words with the steps."""
    bad = np.isinf(run.factors)
    kinds = [
        (run.skipped & bad, "skipped, since their norm was not finite"),
        (run.skipped & ~bad & run.spikes, "skipped as spikes"),
        (run.skipped & ~bad & ~run.spikes, "skipped"),
        (bad & ~run.skipped, "taken though their norm was not finite"),
        (run.large & ~run.skipped, f"with a norm of {SPIKE:g} thresholds or more"),
    ]
    found = [f"{_steps(run, flags)} {what}" for flags, what in kinds if flags.any()]
    for rank, _ in run.suspected[:NAMED]:
        what = f"{run.rank(rank)} far above the other ranks, or not finite, at "
        found.append(what + _steps(run, run.suspects[:, rank]))
    return found or ["nothing"]


def _steps(run: Run, flags: Numbers) -> str:
    """How many steps, and the worst of them by number."""
    count = int(np.count_nonzero(flags))
    named = np.sort(run.data.steps[run.worst_first(flags)[:NAMED]])
    listed = ", ".join(f"{step:,}" for step in named)
    return f"{count:,} step{'s' * (count > 1)} ({'the worst: ' * (count > NAMED)}{listed})"


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
    heads = "run, steps, clipped, skipped, spikes, not finite, median norm, worst norm, threshold, tokens, "
    heads += "median step, not recorded, ranks to look at"
    table = [heads.split(", "), *(_summary(run) for run in runs)]
    tokens = table[0].index("tokens")
    if all(row[tokens] == "-" for row in table[1:]):
        table = [row[:tokens] + row[tokens + 1 :] for row in table]
    return table


def _summary(run: Run) -> list[str]:
    if not len(run.data):
        return [run.name, "0", *["-"] * 11]
    steps, records = run.data.steps, run.data.records
    finite = np.isfinite(run.norms)
    worst = np.where(finite, run.norms, -math.inf).argmax()
    seconds = run.data.numbers["step_s"].values if "step_s" in run.data.numbers else ()
    again = f", started {len(records.headers)} times" if len(records.headers) > 1 else ""
    return [
        run.name,
        f"{len(steps):,} ({steps[0]:,} to {steps[-1]:,}{again})",
        f"{run.clipped.mean():.1%}",
        f"{np.count_nonzero(run.skipped):,}",
        f"{np.count_nonzero(run.spikes | run.large):,}",
        f"{np.count_nonzero(~finite):,}",
        f"{np.median(run.norms[finite]):.4g}" if finite.any() else "-",
        f"{run.norms[worst]:.4g} at step {steps[worst]:,}" if finite.any() else "-",
        _threshold(run),
        _tokens(run),
        f"{np.median(seconds) * 1e3:.3g} ms" if len(seconds) else "-",
        _missing(run),
        ", ".join(f"{run.rank(rank)}: {count:,} steps" for rank, count in run.suspected[:NAMED]) or "none",
    ]


def _threshold(run: Run) -> str:
    """One number, or the least and the greatest."""
    if "threshold" not in run.data.numbers:
        return "one for each group" if run.data.tables["threshold"] else "-"
    values = run.data.numbers["threshold"].values
    values = values[np.isfinite(values)]
    if not len(values):
        return "none"
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}, last {values[-1]:.4g}"


def _tokens(run: Run) -> str:
    """Of the whole run: the last number where it rises from step to step, else the sum."""
    for name in ("tokens", "trained_tokens"):
        if name in run.data.numbers:
            values = run.data.numbers[name].values
            rises = len(values) > 1 and bool((np.diff(values) > 0).all())
            return f"{values[-1] if rises else values.sum():,.0f}"
    return "-"


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
