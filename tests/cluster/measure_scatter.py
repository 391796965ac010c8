"""Run docs/scatter.py on two and four hosts of a lab over each kind of link, and print a Markdown table.

It needs root on Linux, and takes five minutes:

    cd tests && ../.venv/bin/python -m cluster.measure_scatter [unshaped | 10gbit | 1gbit] ...
"""

from __future__ import annotations

import sys

from cluster.lab import LINKS, ROOT, Lab

LIMIT_S = 300


def main(links: list[str]) -> None:
    with Lab() as lab:
        print("| link | hosts | kept for reuse | array | all-sum | sum_scatter | ratio |\n" + "| --- " * 7 + "|")
        for link in links:
            lab.shape(link)
            for n in (2, 4):
                command = [*lab.mpirun(*lab.hosts[:n]), sys.executable, str(ROOT / "docs/scatter.py")]
                ended = lab.on(1, command, limit_s=LIMIT_S)
                if ended.code != 0:
                    sys.exit(f"{link}, {n} hosts: exit code {ended.code}\n{ended.output}")
                for row in ended.output.splitlines():
                    if row.startswith("|"):
                        print(f"| {link} | {n} {row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(LINKS))
