"""Measure on hosts of a lab over each kind of link, and print a Markdown table: root on Linux, one to five minutes.

cd tests
../.venv/bin/python -m cluster.measure norm [unshaped | 10gbit | 1gbit] ...     docs/links.py: the norm's collective
../.venv/bin/python -m cluster.measure scatter ...                              docs/scatter.py: sum_scatter
../.venv/bin/python -m cluster.measure overlap ...                              distclip bench --only overlap
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from launching import Ended

from cluster.lab import LINKS, ROOT, Lab

LIMIT_S = 300
HEADS = {
    "norm": "| link | hosts | | collectives | median, ms | p90, ms | share of the step |",
    "scatter": "| link | hosts | kept for reuse | array | all-sum | sum_scatter | ratio |",
    "overlap": "| link | hosts | device | step | distclip, ms | MLX, ms | ratio | backward alone | all-reduces alone |",
}
COMMANDS = {
    "norm": [str(ROOT / "docs/links.py")],
    "scatter": [str(ROOT / "docs/scatter.py")],
    "overlap": ["-m", "distclip", "bench", "--only", "overlap", "--json", "/tmp/overlap.json"],
}


def rows_of(what: str, ended: Ended, lab: Lab) -> Iterator[str]:
    """The rows of the table, without link and hosts."""
    if what != "overlap":
        yield from (line for line in ended.output.splitlines() if line.startswith("|") and line[2:3] not in ("-", "|"))
        return
    written: Any = json.loads(lab.outside(1, "/tmp/overlap.json").read_text())
    for result in written["results"]:
        step, mlx, backward, reduces = (series["median_s"] * 1e3 for series in result["series"])
        kind = result["tree"].split()[-3].strip(",")
        numbers = f"{step:.1f} | {mlx:.1f} | {step / mlx:.2f} | {backward:.1f} | {reduces:.1f}"
        yield f"| {kind} | {result['case']} | {numbers} |"


def main(what: str, links: list[str]) -> None:
    with Lab() as lab:
        head = HEADS[what]
        print(head + "\n" + "| --- " * (head.count("|") - 1) + "|")
        for link in links:
            lab.shape(link)
            for n in (2, 4) if what != "overlap" else (2,):
                command = [*lab.mpirun(*lab.hosts[:n]), sys.executable, *COMMANDS[what]]
                ended = lab.on(1, command, limit_s=LIMIT_S)
                if ended.code != 0:
                    sys.exit(f"{link}, {n} hosts: exit code {ended.code}\n{ended.output}")
                for row in rows_of(what, ended, lab):
                    print(f"| {link} | {n} {row}", flush=True)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in HEADS:
        sys.exit(f"name what to measure: {', '.join(HEADS)}")
    main(sys.argv[1], sys.argv[2:] or list(LINKS))
