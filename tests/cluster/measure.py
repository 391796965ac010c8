"""Run docs/links.py on two and four hosts of a lab over each kind of link, and print a Markdown table.

It needs root on Linux, and takes three minutes, or one minute for one kind of link:

    cd tests && ../.venv/bin/python -m cluster.measure [unshaped | 10gbit | 1gbit] ...
"""

from __future__ import annotations

import sys

from cluster.lab import LINKS, ROOT, Lab

LIMIT_S = 300


def main(links: list[str]) -> None:
    with Lab() as lab:
        print("| link | hosts | | collectives | median, ms | p90, ms | share of the step |\n" + "| --- " * 7 + "|")
        for link in links:
            lab.shape(link)
            for n in (2, 4):
                command = [*lab.mpirun(*lab.hosts[:n]), sys.executable, str(ROOT / "docs/links.py")]
                ended = lab.on(1, command, limit_s=LIMIT_S)
                if ended.code != 0:
                    sys.exit(f"{link}, {n} hosts: exit code {ended.code}\n{ended.output}")
                for row in ended.output.splitlines()[2:]:
                    print(f"| {link} | {n} {row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(LINKS))
