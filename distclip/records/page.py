"""The page of a report: a file of HTML without scripts that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from distclip.records.figure import color, svg
from distclip.records.panels import Panel, Run

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
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

Table = list[list[str]]  # rows of words under a row of headings; the first word of a row is the name of its run


def page(
    runs: Sequence[Run], panels: list[Panel], summary: Table, events: Table, unlisted: list[str], notes: list[str]
) -> str:
    """The whole page, every text of it escaped.

    Args:
        summary: a row for each run.
        events: a row for each step that is listed.
        unlisted: how many steps are not among them, in sentences.
        notes: what the page does not show, in sentences.
    """
    title = f"Gradient clipping: {', '.join(run.name for run in runs)}"
    colors = {run.name: color(run.number) for run in runs}
    started = "".join(
        f"<details><summary>how {escape(run.name)} was started</summary>"
        f"<pre>{escape(json.dumps(run.data.records.headers, indent=1))}</pre></details>"
        for run in runs
    )
    listed = f"<h2>Spikes, skipped steps and steps that were not finite</h2>{_table(events, colors)}"
    listed += "".join(f"<p>{escape(note)}</p>" for note in unlisted)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>"
        + "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
        + _table(summary, colors)
        + started
        + (svg(panels) if panels else "")
        + (listed if len(events) > 1 else "")
        + "</body></html>\n"
    )


def _table(table: Table, colors: dict[str, str]) -> str:
    heads, *rows = table
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row" style="color:{colors[row[0]]}">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
