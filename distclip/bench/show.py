"""Tables for the terminal, and a chart."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from distclip.bench.timing import Result, Series


def table(result: Result) -> str:
    """The contestants of one case, in the order they are written in, and what it comes to."""
    width = max(len(one.name) for one in result.series)
    head = f"{result.case} | {result.tree} | {result.dtype}"
    lines = [head, f"  {'':{width}}  {'ms':>9}  {'x distclip':>10}  {'GB/s':>6}  rel. error"]
    for one in result.series:
        error = "" if one.error is None else f"{one.error:.1e}"
        speed = result.bytes / one.median / 1e9
        ratio = one.median / result.baseline
        lines.append(f"  {one.name:{width}}  {one.median * 1e3:9.3f}  {ratio:10.2f}  {speed:6.2f}  {error}".rstrip())
    return "\n".join([*lines, *(f"  {line}" for line in summary(result))])


def summary(result: Result) -> list[str]:
    """In a line or two: how far distclip is from the floors and from the others."""
    if result.shares:
        return [", ".join(f"{name}: {share:.2%} of the step" for name, share in result.shares.items())]
    floors = [f"{result.baseline / one.median:.2f} of a {one.name}" for one in result.series if one.floor]
    others = [
        f"{best.median / result.baseline:.1f} x as fast as {name}"
        for name in ("MLX", "torch", "optax")
        if (best := _best(result, name)) is not None
    ]
    lines = [f"distclip: {', '.join(part)}" for part in (floors, others) if part]
    return [*lines, f"{result.baseline / result.values * 1e9:.3f} ns per value"]


def _best(result: Result, name: str) -> Series | None:
    """The fastest of a library's ways; of MLX the eager one, which stands beside distclip's own."""
    ways = [one for one in result.series if one.name == name or (name != "MLX" and one.name.startswith(f"{name},"))]
    return min(ways, key=lambda one: one.median, default=None)


def memory_table(memory: dict[str, dict[str, float]], tree: str) -> str:
    lines = [f"peak memory above the gradients | {tree} | float32"]
    for case, found in memory.items():
        lines += [f"  {case:14}  {name:8}  {part:8.2%} of their size" for name, part in found.items()]
    return "\n".join(lines)


def chart(results: list[Result], title: str, path: Path) -> None:
    """A mark for each contestant of each case, at its time relative to distclip's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = _looks(results)
    figure, axes = plt.subplots(figsize=(11, 2 + 0.42 * len(results)), layout="constrained")
    for row, result in enumerate(results):
        axes.axhline(row, color="0.9", zorder=0)
        for one in result.series:
            axes.plot(one.median / result.baseline, row, label=one.name, **looks[one.name])
    axes.axvline(1, color="C0", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("time, as a multiple of distclip's (left of the line: faster)")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
    axes.set_yticks(range(len(results)), [f"{r.case}\n{r.tree}, {r.dtype}" for r in results], fontsize=8)
    axes.invert_yaxis()
    figure.suptitle("\n".join(textwrap.wrap(title, 130)), fontsize=9, x=0.01, ha="left")
    marks, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, marks, strict=True))
    axes.legend(once.values(), once.keys(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _looks(results: list[Result]) -> dict[str, dict[str, Any]]:
    """A colour for each library and a shape for each of its ways; floors are grey."""
    looks: dict[str, dict[str, Any]] = {}
    libraries: dict[str, int] = {}
    for one in (one for result in results for one in result.series if one.name not in looks):
        library = "floor" if one.floor else one.name.split(",")[0]
        ways = sum(look["library"] == library for look in looks.values())
        if one.floor:
            look = {"marker": "12+x"[ways % 4], "color": "0.3"}
        else:
            colour = f"C{libraries.setdefault(library, len(libraries))}"
            look = {"marker": "oD^sv"[ways % 5], "color": colour, "markerfacecolor": colour if ways == 0 else "none"}
        looks[one.name] = {**look, "markersize": 8, "linestyle": "none", "library": library}
    return {name: {key: value for key, value in look.items() if key != "library"} for name, look in looks.items()}
