"""Draw the panels of a report with matplotlib: SVG for the page, PNG for elsewhere."""

from __future__ import annotations

import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, style, ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN

from distclip.records.columns import Numbers
from distclip.records.panels import SPIKE, Panel

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind
DASHES = ("-", "--", ":", "-.")
BAD = "#d62728"
GREY = "#808080"  # of axes, on a white page and on a dark one
LARGEST = 1e300  # what is drawn: axes cannot reach further
STYLE: Any = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), "black"),
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.alpha": 0.25,
    "image.interpolation": "none",
    "legend.fontsize": 7,
    "lines.linewidth": 1,
    "svg.fonttype": "none",  # text stays text: small, and in the page's colour
    "svg.hashsalt": "distclip",  # the same picture each time
    "text.parse_math": False,  # a name may have dollars
}


def svg(panels: list[Panel]) -> str:
    """The picture for a page of HTML: transparent, its text black."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _save(panels, file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    return re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text[text.index("<svg") :], count=3)


def png(panels: list[Panel], path: Path) -> None:
    _save(panels, path, dpi=110)


def _save(panels: list[Panel], file: Any, **options: Any) -> None:
    with style.context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name may have letters that the font lacks
        _figure(panels).savefig(file, **options)


def _figure(panels: list[Panel]) -> Figure:
    heights = [0.55 + max(0.16 * len(panel.rows) or 1.6, 0.5, 0.15 * (len(panel.lines) + 2)) for panel in panels]
    figure = Figure(figsize=(10, sum(heights) + 0.2))
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_title(_short(panel.title, 110))
        (_draw_heat if panel.rows else _draw_lines)(figure, axes, panel)
        axes.set_xlim(*panel.span)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return figure


def color(run: int) -> str:
    return COLORS[run % len(COLORS)]


def _short(text: str, most: int = 28) -> str:
    """A name that fits, without line breaks and whatever else is no letter."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def _draw_lines(figure: Figure, axes: Any, panel: Panel) -> None:
    low, high = _range(panel)
    for line in panel.lines:
        ys = np.where(_drawable(line.ys, panel.log), line.ys, math.nan)
        look: dict[str, Any] = {"color": color(line.run), "linestyle": DASHES[line.dash], "label": _short(line.label)}
        axes.plot(line.xs, ys, marker=".", markersize=2, markevery=_alone(ys), **look)
    handles = axes.get_legend_handles_labels()[0]
    for bad, marker, label in ((False, CARETDOWN, f"{SPIKE:g} thresholds or more"), (True, "x", "norm not finite")):
        marks = [mark for mark in panel.marks if math.isfinite(mark.y) != bad]
        if marks:
            steps, heights = [mark.step for mark in marks], [high if bad else min(mark.y, high) for mark in marks]
            shades = [BAD if bad else color(mark.run) for mark in marks]
            axes.scatter(steps, heights, 25, shades, marker, clip_on=False, zorder=3)
            shade = BAD if bad else GREY  # as triangles have the colours of their runs
            look = {"marker": marker, "markersize": 5, "linestyle": "none"}
            handles.append(Line2D([], [], color=shade, label=label, **look))
    axes.set(ylim=(low, high), yscale="log" if panel.log else "linear")
    _set_ticks(axes.yaxis, low, high, panel.log)
    axes.grid()
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1.05), borderaxespad=0)


def _draw_heat(figure: Figure, axes: Any, panel: Panel) -> None:
    """The cells as an image: empty where there is no step, red where a value was not finite."""
    low, high = _range(panel)
    shades = colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0), over=BAD)
    extent = (*panel.extent, len(panel.rows), 0)
    cells = np.clip(panel.cells, low, 2 * high)
    image = axes.imshow(cells, cmap=shades, norm=LogNorm(low, high), aspect="auto", extent=extent)
    axes.set_yticks(np.arange(len(panel.rows)) + 0.5, [_short(name, 24) for name in panel.rows])
    axes.tick_params(left=False)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.01, 0, 0.015, 1)))
    bar.outline.set_visible(False)
    bar.ax.set_title("norm", fontsize=7, loc="left", pad=3)
    if np.isinf(panel.cells).any():
        red = Line2D([], [], color=BAD, marker="s", linestyle="none", markersize=5, label="norm not finite")
        axes.legend(handles=[red], loc="upper left", bbox_to_anchor=(1.055, 1.1), borderaxespad=0, handletextpad=0)
    _set_ticks(bar.ax.yaxis, low, high, True)


def _drawable(values: Numbers, log: bool) -> Numbers:
    return (np.abs(values) < LARGEST) & ((values > 1 / LARGEST) | (not log))


def _range(panel: Panel) -> tuple[float, float]:
    """(min, max) of what is drawn, padded."""
    marks = [np.array([mark.y for mark in panel.marks])]
    values = np.concatenate([line.ys for line in panel.lines] + marks + [panel.cells.ravel(), panel.scale or ()])
    values = values[_drawable(values, panel.log)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 1.0)
    if panel.log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _alone(ys: Numbers) -> list[int]:
    """The points between two gaps: a line does not show them."""
    drawn = np.concatenate([[False], np.isfinite(ys), [False]])
    return np.flatnonzero(drawn[1:-1] & ~drawn[:-2] & ~drawn[2:]).tolist()


def _set_ticks(axis: Any, low: float, high: float, log: bool) -> None:
    if not log or high < 10 * low:
        axis.set_major_locator(ticker.MaxNLocator(5))
    else:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=8))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:.6g}"))
    axis.minorticks_off()
