"""Tables for the terminal, and a chart."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from distclip.bench.device import Reading
from distclip.bench.timing import Result


def table(result: Result) -> str:
    """The contestants of a case in their order, and a summary."""
    width = max(len(series.name) for series in result.series)
    head = f"{result.case} | {result.tree} | {result.dtype}"
    lines = [head, f"  {'':{width}}  {'ms':>9}  {'x distclip':>10}  {'GB/s':>6}  {'memory':>6}  rel. error"]
    for series in result.series:
        ms, ratio = series.median * 1e3, series.median / result.baseline
        speed = result.bytes / series.median / 1e9
        peak = "" if series.peak_bytes is None else f"{series.peak_bytes / result.bytes:.0%}"
        error = "" if series.error is None else f"{series.error:.1e}"
        lines.append(f"  {series.name:{width}}  {ms:9.3f}  {ratio:10.2f}  {speed:6.2f}  {peak:>6}  {error}".rstrip())
    return "\n".join([*lines, *(f"  {line}" for line in summary(result))])


def summary(result: Result) -> list[str]:
    """Compare distclip with the floors and with the other libraries."""
    if result.shares:
        return [", ".join(f"{name}: {share:.2%} of {result.whole}" for name, share in result.shares.items())]
    floors = [f"{result.baseline / series.median:.2f} of a {series.name}" for series in result.series if series.floor]
    libraries = []
    for name in ("MLX", "torch", "optax"):  # the fastest variant of each; of MLX the eager function, as of distclip
        variants = [s for s in result.series if s.name == name or (name != "MLX" and s.name.startswith(f"{name},"))]
        if variants:
            libraries.append(f"{min(s.median for s in variants) / result.baseline:.1f} x as fast as {name}")
    lines = [f"distclip: {', '.join(ratios)}" for ratios in (floors, libraries) if ratios]
    return [*lines, f"{result.baseline / result.values * 1e9:.3f} ns per value"]


def memory_table(memory: dict[str, dict[str, float]], tree: str) -> str:
    lines = [f"peak memory above the gradients | {tree} | float32"]
    for case, peaks in memory.items():
        lines += [f"  {case:14}  {name:8}  {peak:8.2%} of their size" for name, peak in peaks.items()]
    return "\n".join(lines)


def readings_table(readings: list[Reading]) -> str:
    """The readings below their questions."""
    width = max(len(reading.name) for reading in readings)
    lines = []
    for question, answers in groupby(readings, lambda reading: reading.question):
        lines.append(question)
        for reading in answers:
            value = f"{reading.value:10.4g}" if isinstance(reading.value, float) else reading.value
            lines.append(f"  {reading.name:{width}}  {value} {reading.unit}".rstrip())
    return "\n".join(lines)


def chart(results: list[Result], title: str, path: Path) -> None:
    """Draw a mark for each contestant of each case, at its time relative to distclip's."""
    from matplotlib.figure import Figure

    styles = _styles(results)
    figure = Figure(figsize=(11, 2 + 0.42 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        axes.axhline(row, color="0.9", zorder=0)
        for series in result.series:
            axes.plot(series.median / result.baseline, row, label=series.name, ms=8, ls="", **styles[series.name])
    axes.axvline(1, color="C0", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("time, as a multiple of distclip's (left of the line: faster)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
    axes.set_yticks(range(len(results)), [f"{r.case}\n{r.tree}, {r.dtype}" for r in results], fontsize=8)
    axes.invert_yaxis()
    figure.suptitle("\n".join(textwrap.wrap(title, 130)), fontsize=9, x=0.01, ha="left")
    marks, labels = axes.get_legend_handles_labels()
    legend = dict(zip(labels, marks, strict=True))  # each label once
    axes.legend(legend.values(), legend.keys(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _styles(results: list[Result]) -> dict[str, dict[str, Any]]:
    """Matplotlib's style of each contestant: a colour for each library, a shape for each variant; floors are grey."""
    variants: dict[str, dict[str, None]] = {}  # the names of each library's contestants, in their order
    for series in [series for result in results for series in result.series]:
        library = "floor" if series.floor else re.split(r",| \(", series.name)[0]
        variants.setdefault(library, {})[series.name] = None
    floors = variants.pop("floor", {})
    styles = {name: {"marker": "12+x"[i % 4], "color": "0.3"} for i, name in enumerate(floors)}
    for color, names in enumerate(variants.values()):
        for i, name in enumerate(names):
            styles[name] = {"marker": "oD^sv"[i % 5], "color": f"C{color}", "fillstyle": "none" if i else "full"}
    return styles
