"""Put several runs of `distclip bench --json` together: the tables and the picture of docs/explanation/performance.md.

    python docs/performance.py FILE.json ...      writes docs/images/performance.png (needs `pip install '.[bench]'`)

A contestant's time is the median over the rounds of all files that have its case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distclip.bench.show import chart
from distclip.bench.timing import Result, Series

IMAGE = Path(__file__).parent / "images/performance.png"
COLUMNS = {  # the contestants of a column: the fastest counts
    "distclip": ("distclip", "distclip (native)"),  # over several ranks, alone
    "distclip, compiled": ("distclip, compiled", "distclip (native), compiled"),
    "MLX": ("MLX",),
    "MLX, compiled": ("MLX, compiled",),
    "PyTorch": ("torch, 1 thread", "torch, 2 threads"),
    "optax, jit": ("optax, jit",),
    "read": ("plain read, 1 thread", "plain read, 2 threads"),
    "all-reduce": ("bare all-reduce",),
}


def merge(runs: list[dict[str, Any]]) -> list[Result]:
    """All samples of each case."""
    merged: dict[tuple[str, ...], Result] = {}
    for case in [case for run in runs for case in run["results"]]:
        about = {name: case[name] for name in ("part", "case", "tree", "dtype")}
        series = [Series(measured["name"], measured["floor"]) for measured in case["series"]]
        result = Result(**about, bytes=case["bytes"], values=case["values"], series=series)
        result = merged.setdefault(tuple(about.values()), result)
        for series_so_far, measured in zip(result.series, case["series"], strict=True):
            series_so_far.seconds += measured["seconds"]
            series_so_far.error = measured["error"]
    return list(merged.values())


def row(result: Result, columns: list[str]) -> str:
    cells = [f"{result.case}, {result.tree}, {result.dtype}"]
    for column in columns:
        times = [series.median for series in result.series if series.name in COLUMNS[column]]
        cells.append(f"{min(times) * 1e3:.2f}" if times else "")
    errors = [s.error for s in result.series if s.name in COLUMNS["distclip"] and s.error is not None]
    return "| " + " | ".join(cells + [f"{error:.0e}" for error in errors]) + " |"


def print_table(results: list[Result]) -> None:
    columns = [c for c in COLUMNS if any(s.name in COLUMNS[c] for result in results for s in result.series)]
    print("| ms | " + " | ".join(columns) + " | relative error |\n" + "| --- " * (len(columns) + 2) + "|")
    print("\n".join(row(result, columns) for result in results) + "\n")


def main(paths: list[str]) -> None:
    runs = [json.loads(Path(path).read_text()) for path in paths]
    results = merge(runs)
    print_table([result for result in results if result.part in ("norm", "clip")])
    print_table([result for result in results if result.part == "parallel"])
    for result in results:
        if result.part == "step":
            print(", ".join(f"{series.name}: {series.median * 1e3:.2f} ms" for series in result.series))
    for run in runs:
        print({case: {name: f"{peak:.2%}" for name, peak in peaks.items()} for case, peaks in run["memory"].items()})
    machine = runs[0]["machine"]
    title = f"{machine['processor']}, {machine['cores']} cores, mlx {machine['mlx']}: medians over {len(runs)} files"
    chart([result for result in results if result.part != "step"], title, IMAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
