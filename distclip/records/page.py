"""The panels of a report as a page without a network, and as a picture."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distclip.records.strict import strict

if TYPE_CHECKING:
    from distclip.records.report import Run

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind
DASHES = (("", "-"), ("6 4", "--"), ("2 3", ":"), ("8 3 2 3", "-."))  # of SVG and of matplotlib
BAD = (214, 39, 40)
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, from small to large
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 150, 12, 8, 24  # of a drawing, and its margins

STYLE = """
:root { color-scheme: light dark; --soft: #8884; --warn: #b00 }
@media (prefers-color-scheme: dark) { :root { --warn: #f77 } }
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1000px; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 1.6rem 0 .2rem } .warn { color: var(--warn) }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--soft) }
svg { display: block; width: 100%; height: auto; overflow: visible } svg text { font-size: 11px; fill: currentColor }
.legend { font-size: .85rem; display: flex; flex-wrap: wrap; gap: 0 1.2rem }
.legend svg { display: inline; width: 28px; height: 8px; margin-right: .3rem } image { image-rendering: pixelated }
#tip { position: fixed; pointer-events: none; background: Canvas; border: 1px solid var(--soft); padding: .3rem .5rem;
  font-size: .8rem; white-space: pre; display: none }
"""

# Shows the values below the pointer, from the same points that are drawn.
SCRIPT = """
window.onerror = text => { document.documentElement.dataset.error = text };
const panels = JSON.parse(document.getElementById("panels").textContent), tip = document.getElementById("tip");
const say = v => typeof v === "number" ? +v.toPrecision(4) : v === null ? "no step" : v;
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle; else high = middle }
  return x - xs[low] < xs[high] - x ? low : high;
}
document.querySelectorAll("figure > svg").forEach((svg, i) => {
  const panel = panels[i], bar = svg.querySelector(".bar"), [left, top, width, height] = panel.box;
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; bar.setAttribute("visibility", "hidden") });
  svg.addEventListener("pointermove", event => {
    const edge = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / edge.width;
    const x = Math.min(Math.max((event.clientX - edge.left) * zoom - left, 0), width - 1e-6);
    const y = Math.min(Math.max((event.clientY - edge.top) * zoom - top, 0), height - 1e-6);
    const step = panel.span[0] + x / width * (panel.span[1] - panel.span[0]);
    const row = Math.floor(y / height * panel.rows.length);
    const cell = ([name, values]) => `${name}: ${say(values[Math.floor(x / width * values.length)])}`;
    const point = ([name, xs, ys], n = nearest(xs, step)) => `step ${xs[n]}  ${name}: ${say(ys[n])}`;
    tip.textContent = panel.rows.length
      ? `step ${Math.floor(step)}\\n${cell([panel.rows[row], panel.cells[row]])}`
      : panel.lines.map(line => point(line)).join("\\n");
    tip.style.display = "block";
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4) + "px";
    tip.style.top = event.clientY + 14 + "px";
    bar.setAttribute("transform", `translate(${left + x})`);
    bar.setAttribute("visibility", "visible");
  });
});
document.documentElement.dataset.ready = panels.length;
"""


@dataclass
class Line:
    """A curve of a run; its points are thinned, and break off where a value is not finite."""

    run: int  # which of the runs
    label: str
    xs: list[int]
    ys: list[float]
    dash: int = 0  # which of the styles


@dataclass
class Mark:
    run: int
    step: int
    y: float  # infinite: on the upper edge
    text: str

    @property
    def bad(self) -> bool:
        return not math.isfinite(self.y)


@dataclass
class Panel:
    title: str
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    log: bool = False
    rows: list[str] = field(default_factory=list)  # of a heat map, and
    cells: list[list[float | None]] = field(
        default_factory=list
    )  # its columns in each: NaN is not finite, None no step
    span: tuple[int, int] = (0, 1)  # first and last step

    def range(self) -> tuple[float, float]:
        """The least and the greatest of what is drawn, a little apart."""
        values = [y for line in self.lines for y in line.ys] + [mark.y for mark in self.marks]
        values += [value for row in self.cells for value in row if value is not None]
        values = [value for value in values if abs(value) < 1e300 and (value > 0 or not self.log)] or [1.0]
        low, high = min(values), max(values)
        if self.log:
            return low / 1.1, high * 1.1
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return low - room, high + room


def page(runs: list[Run], panels: list[Panel], table: list[list[str]], notes: list[str]) -> str:
    """The whole page, every text of it escaped."""
    title = f"Gradient clipping: {', '.join(run.name for run in runs)}"
    head, *rows = table
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row" style="color:{_color(i)}">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for i, row in enumerate(rows)
    )
    headers = "".join(
        f"<details><summary>how {escape(run.name)} was started</summary>"
        f"<pre>{escape(json.dumps(run.records.headers, indent=1))}</pre></details>"
        for run in runs
    )
    data = json.dumps([_data(panel) for panel in panels], separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>"
        + "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
        + f'<div class="wide"><table><tr>{heads}</tr>{body}</table></div>{headers}'
        + "".join(_figure(panel) for panel in panels)
        + f'<div id="tip"></div><script type="application/json" id="panels">{data}</script><script>{SCRIPT}</script>'
        "</body></html>\n"
    )


def _color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _height(panel: Panel) -> float:
    return 16 * len(panel.rows) if panel.rows else 190


def _data(panel: Panel) -> dict[str, Any]:
    """What the script needs of a panel."""
    box = (LEFT, TOP, WIDTH - LEFT - RIGHT, _height(panel))
    lines = [(line.label, line.xs, _short(line.ys)) for line in panel.lines]
    cells = [_short(row) for row in panel.cells]
    return {"box": box, "span": panel.span, "lines": lines, "rows": panel.rows, "cells": cells}


def _short(values: list[Any]) -> Any:
    return strict([None if value is None else float(f"{value:.5g}") for value in values])


def _figure(panel: Panel) -> str:
    height = _height(panel)
    low, high = panel.range()
    title = escape(panel.title)
    drawn = _image(panel, low, high) if panel.rows else "".join(_grid(panel, low, high))
    drawn += "".join(
        f'<text x="{_x(panel, x):.1f}" y="{TOP + height + 16}" text-anchor="middle">{x:,}</text>' for x in _steps(panel)
    )
    drawn += "".join(_path(panel, line, low, high) for line in panel.lines)
    drawn += "".join(
        f'<path d="M{_x(panel, mark.step):.1f} {TOP if mark.bad else _y(panel, mark.y, low, high):.1f}'
        + (f'm-4 -4l8 8m0 -8l-8 8" stroke="rgb{BAD}"' if mark.bad else f'm-4 -4h8l-4 5z" stroke="{_color(mark.run)}"')
        + f' fill="none" stroke-width="2"><title>step {mark.step:,}, {escape(mark.text)}</title></path>'
        for mark in panel.marks
    )
    drawn += f'<path class="bar" visibility="hidden" d="M0 {TOP}v{height}" stroke="currentColor" opacity=".4"/>'
    return (
        f"<figure style='margin:0'><h2>{title}</h2><div class='legend'>{''.join(_legend(panel, low, high))}</div>"
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {WIDTH} {TOP + height + BOTTOM}">{drawn}</svg></figure>'
    )


def _legend(panel: Panel, low: float, high: float) -> Iterator[str]:
    for line in panel.lines:
        stroke = f'stroke="{_color(line.run)}" stroke-dasharray="{DASHES[line.dash][0]}" stroke-width="2"'
        yield f'<span><svg viewBox="0 0 28 8"><path d="M0 4h28" {stroke}/></svg>{escape(line.label)}</span>'
    if any(not mark.bad for mark in panel.marks):
        yield "<span>&#9661; far above the threshold</span>"
    if any(mark.bad for mark in panel.marks):
        yield f'<span><b style="color:rgb{BAD}">&#215;</b> not finite</span>'
    if panel.rows:
        shades = ",".join(f"rgb{color}" for color in HEAT)
        yield f'<span>{low * 1.1:.3g} <span style="background:linear-gradient(90deg,{shades});padding:0 3rem"></span>'
        yield f' {high / 1.1:.3g}</span><span><b style="color:rgb{BAD}">&#9632;</b> not finite</span>'


def _x(panel: Panel, step: float) -> float:
    first, last = panel.span
    return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)


def _y(panel: Panel, value: float, low: float, high: float) -> float:
    if panel.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return TOP + (high - value) / (high - low) * _height(panel)


def _grid(panel: Panel, low: float, high: float) -> Iterator[str]:
    for value in ticks(low, high, panel.log):
        y = _y(panel, value, low, high)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--soft)"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _steps(panel: Panel) -> list[int]:
    return sorted({round(x) for x in ticks(*panel.span, False)})


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers in a range: three to nine, or powers of ten of a log scale.

    >>> ticks(0, 100, False)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    >>> ticks(0.02, 3, True)
    [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
    """
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every, parts = max(1, (last - first) // 6), (1, 2, 5) if last - first <= 3 else (1,)
        powers = range(first, last + 1, every)
        found = [value for e in powers for part in parts if low <= (value := float(f"{part}e{e}")) <= high]
        if len(found) > 1:
            return found
    size = 10.0 ** math.floor(math.log10(high - low))
    size *= next((part for part in (0.2, 0.5, 1.0) if (high - low) / (size * part) <= 7), 1.0)
    return [float(f"{i * size:.10g}") for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _path(panel: Panel, line: Line, low: float, high: float) -> str:
    """Its points, with a gap where one cannot be drawn; a point between two gaps is a dot."""
    parts: list[list[str]] = [[]]
    for step, value in zip(line.xs, line.ys, strict=True):
        if math.isfinite(value) and (value > 0 or not panel.log):
            parts[-1].append(f"{_x(panel, step):.1f} {_y(panel, value, low, high):.1f}")
        elif parts[-1]:
            parts.append([])
    drawn = "".join(f"M{'L'.join(part)}{'h0' if len(part) == 1 else ''}" for part in parts if part)
    style = f'stroke="{_color(line.run)}" stroke-dasharray="{DASHES[line.dash][0]}" stroke-linecap="round"'
    return f'<path class="line" d="{drawn}" {style} fill="none" stroke-width="1.4"/>'


def _image(panel: Panel, low: float, high: float) -> str:
    height = _height(panel)
    rows = b"".join(b"\0" + b"".join(bytes(_shade(value, low, high)) for value in row) for row in panel.cells)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(panel.cells[0]), len(panel.cells), 8, 6, 0, 0, 0)  # 8 bits of RGBA
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    place = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{height}"'
    names = "".join(
        f'<text x="{LEFT - 6}" y="{TOP + 12 + 16 * i}" text-anchor="end">{escape(_cut(name))}<title>{escape(name)}'
        "</title></text>"
        for i, name in enumerate(panel.rows)
    )
    return f'<image href="{source}" {place} preserveAspectRatio="none"/>{names}'


def _cut(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _shade(value: float | None, low: float, high: float) -> tuple[int, int, int, int]:
    if value is None:
        return (0, 0, 0, 0)
    if not math.isfinite(value):
        return (*BAD, 255)
    place = math.log(min(max(value, low), high) / low) / math.log(high / low) * (len(HEAT) - 1)
    i = min(int(place), len(HEAT) - 2)
    red, green, blue = (round(a + (b - a) * (place - i)) for a, b in zip(HEAT[i], HEAT[i + 1], strict=True))
    return (red, green, blue, 255)


def draw(panels: list[Panel], path: Path) -> None:
    """The same as a picture."""
    from matplotlib.figure import Figure
    from matplotlib.markers import CARETDOWN

    heights = [1 + 0.16 * len(panel.rows) if panel.rows else 2.2 for panel in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.3), layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        low, high = panel.range()
        axes.set_title(_plain(panel.title), fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        if panel.rows:
            cells = [[_shade(value, low, high) for value in row] for row in panel.cells]
            axes.imshow(cells, aspect="auto", interpolation="nearest", extent=(*panel.span, len(cells), 0))
            axes.set_yticks([i + 0.5 for i in range(len(cells))], [_plain(_cut(name)) for name in panel.rows])
            continue
        for line in panel.lines:
            style = {"color": _color(line.run), "linestyle": DASHES[line.dash][1], "linewidth": 1, "marker": ""}
            axes.plot(line.xs, line.ys, label=_plain(line.label), **style)
        for mark in panel.marks:
            y, color = (high, [part / 255 for part in BAD]) if mark.bad else (mark.y, _color(mark.run))
            shape: Any = "x" if mark.bad else CARETDOWN
            axes.plot(mark.step, y, marker=shape, color=color, markersize=5, clip_on=False)
        axes.set(xlim=panel.span, ylim=(low, high), yscale="log" if panel.log else "linear")
        axes.set_yticks(marks := ticks(low, high, panel.log), [f"{value:g}" for value in marks])
        axes.minorticks_off()
        axes.grid(color="0.9")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=110)


def _plain(text: str) -> str:
    """Not read as mathematics, which matplotlib sees between dollars."""
    return text.replace("$", r"\$")
