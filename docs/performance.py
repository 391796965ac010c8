"""Put several runs of `distclip bench --json` together: the tables and the picture of docs/performance.md.

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
COLUMNS = {  # the contestants of each, of which the fastest counts
    "distclip": ("distclip",),
    "distclip, compiled": ("distclip, compiled",),
    "MLX": ("MLX",),
    "MLX, compiled": ("MLX, compiled",),
    "PyTorch": ("torch, 1 thread", "torch, 2 threads"),
    "optax, jit": ("optax, jit",),
    "read": ("plain read, 1 thread", "plain read, 2 threads"),
    "all-reduce": ("bare all-reduce",),
}


def together(runs: list[dict[str, Any]]) -> list[Result]:
    found: dict[tuple[str, ...], Result] = {}
    for one in (one for run in runs for one in run["results"]):
        part, case, tree, dtype = key = one["part"], one["case"], one["tree"], one["dtype"]
        series = [Series(s["name"], s["floor"]) for s in one["series"]]
        result = found.setdefault(key, Result(part, case, tree, dtype, one["bytes"], one["values"], series))
        for mine, sampled in zip(result.series, one["series"], strict=True):
            mine.seconds += sampled["seconds"]
            mine.error = sampled["error"]
    return list(found.values())


def row(result: Result, columns: list[str]) -> str:
    cells = [f"{result.case}, {result.tree}, {result.dtype}"]
    for column in columns:
        times = [one.median for one in result.series if one.name in COLUMNS[column]]
        cells.append(f"{min(times) * 1e3:.2f}" if times else "")
    errors = [float(one.error) for one in result.series if one.name == "distclip" and one.error is not None]
    return "| " + " | ".join(cells + [f"{error:.0e}" for error in errors]) + " |"


def main(paths: list[str]) -> None:
    runs = [json.loads(Path(path).read_text()) for path in paths]
    results = together(runs)
    for parallel in (False, True):
        mine = [one for one in results if (one.part == "parallel") == parallel and one.part != "step"]
        columns = [c for c in COLUMNS if any(s.name in COLUMNS[c] for one in mine for s in one.series)]
        print("| ms | " + " | ".join(columns) + " | relative error |\n" + "| --- " * (len(columns) + 2) + "|")
        print("\n".join(row(one, columns) for one in mine) + "\n")
    for one in results:
        if one.part == "step":
            print(", ".join(f"{series.name}: {series.median * 1e3:.2f} ms" for series in one.series))
    for run in runs:
        print({case: {name: f"{part:.2%}" for name, part in found.items()} for case, found in run["memory"].items()})
    about = runs[0]["machine"]
    title = f"{about['processor']}, {about['cores']} cores, mlx {about['mlx']}: medians over {len(runs)} files"
    chart([one for one in results if one.part != "step"], title, IMAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
