"""Measure the parts of the bench, print the results, and write them to files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from distclip.bench import machine, parallel
from distclip.bench.peers import Peers
from distclip.bench.show import chart, memory_table, table
from distclip.bench.step import memory, training_step
from distclip.bench.timing import Result, interleave
from distclip.bench.trees import Grads, Tree, trees
from distclip.records.strict import strict
from distclip.world import World


class Bench:
    """Measures the parts, shows each result as it comes, and keeps them all."""

    def __init__(self, args: argparse.Namespace, parts: set[str], world: World):
        self.args, self.parts, self.world = args, parts, world
        self.rounds = args.rounds or (3 if args.quick else 5)
        self.megabytes = args.megabytes or (64 if args.quick else 256)
        self.machine: dict[str, Any] = {}
        self.results: list[Result] = []
        self.memory: dict[str, dict[str, float]] = {}
        self.left_out: list[str] = []

    def measure(self) -> None:
        if self.world.size > 1:
            self._describe(libraries={})
            self._measure_parallel()
            return
        peers = Peers()
        self._describe(peers.versions())
        for line in peers.missing:
            self._leave_out(line)
        if self.parts & {"norm", "clip"}:
            self._measure_trees(peers)
        if "step" in self.parts:
            self._measure_step()
        if "memory" in self.parts:
            self._measure_memory()
        if self.args.only is None:
            self._leave_out("The average and the clip over several ranks need mpirun: mpirun -n 2 distclip bench")

    def _describe(self, libraries: dict[str, str]) -> None:
        self.machine = machine.describe(libraries, self.world)
        self._print(_headline(self.machine))

    def _measure_trees(self, peers: Peers) -> None:
        for tree in trees(self.megabytes, transformer=not self.args.quick):
            needed = 9 * tree.bytes  # each library's own gradients, the clipped ones, and those of the floors
            if needed > machine.free_memory():
                self._leave_out(f"{tree.name} is left out: it needs {needed / 1e9:.0f} GB of free memory")
                continue
            grads = Grads(tree.shapes, [tree.dtype] * len(tree.shapes))
            for case in tree.cases:
                if _part(case) in self.parts:
                    self._measure_case(peers, tree, grads, case)

    def _measure_case(self, peers: Peers, tree: Tree, grads: Grads, case: str) -> None:
        self._progress(f"{case} of {tree.name}, {tree.dtype}")
        if case == "norm":
            contestants = peers.norm(grads)
        else:
            max_norm = grads.norm * (2 if case.startswith("no clip") else 0.5)
            contestants = peers.clip(grads, max_norm, given_up="given up" in case)
        if tree.small:
            contestants = [c for c in contestants if not c.floor and not self._too_slow(c.name)]
        result = Result(
            part=_part(case),
            case=case,
            tree=tree.name,
            dtype=tree.dtype,
            bytes=grads.bytes,
            values=grads.values,
            series=interleave(contestants, math.ceil(self.rounds * tree.weight), grads.norm),
        )
        self._add(result)

    def _too_slow(self, name: str) -> bool:
        return self.args.quick and name.startswith("optax")  # XLA compiles half a minute for 2,000 leaves

    def _measure_step(self) -> None:
        self._progress("the training step")
        self._add(training_step(self.rounds * (5 if self.args.quick else 8)))

    def _measure_memory(self) -> None:
        size = max(self.megabytes * 10**6 // 256 // 4, 1)
        self._progress("memory")
        self.memory = memory(Grads([(size,)] * 256, ["float32"] * 256))
        self._print(memory_table(self.memory, f"256 x {self.megabytes / 256:.3g} MB"))

    def _measure_parallel(self) -> None:
        for result in parallel.results(self.world, max(self.megabytes // 4, 1), self.rounds, self._progress):
            self._add(result)

    def _add(self, result: Result) -> None:
        self.results.append(result)
        self._print(table(result))

    def _leave_out(self, why: str) -> None:
        self.left_out.append(why)
        self._print(why)

    def _print(self, text: str) -> None:
        if self.world.rank == 0:
            self._progress("")
            print(text, end="\n\n", flush=True)

    def _progress(self, text: str) -> None:
        """Show what is being measured, on a line of the terminal that the next result overwrites."""
        if self.world.rank == 0 and sys.stderr.isatty():
            print(f"\r{text and text + ' ...'}\x1b[K", end="", file=sys.stderr, flush=True)

    def write(self) -> None:
        """Write the files of ``--json`` and ``--chart``."""
        if self.args.json:
            everything = {
                "command": ["distclip", *sys.argv[1:]],
                "machine": self.machine,
                "rounds": self.rounds,
                "left_out": self.left_out,
                "results": [_result_to_dict(result) for result in self.results],
                "memory": self.memory,
            }
            self.args.json.write_text(json.dumps(strict(everything), indent=1, allow_nan=False) + "\n")
            print(f"every sample is in {self.args.json}")
        if self.args.chart:
            results = [result for result in self.results if result.part != "step"]
            chart(results, _headline(self.machine), self.args.chart)
            print(f"the chart is in {self.args.chart}")


def _part(case: str) -> str:
    return "norm" if case == "norm" else "clip"


def _result_to_dict(result: Result) -> dict[str, Any]:
    series = [
        asdict(series)
        | {
            "median_s": series.median,
            "times_distclip": series.median / result.baseline,
            "bytes_per_s": result.bytes / series.median,
        }
        for series in result.series
    ]
    return asdict(result) | {"series": series}


def _headline(machine: dict[str, Any]) -> str:
    kernel = f"{machine['instructions']}, {machine['threads']} threads" if machine["instructions"] else "MLX operations"
    names = ("distclip", "mlx", "torch", "jax", "optax", "numpy")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if name in machine)
    ranks = f", {machine['ranks']} ranks over {machine['backend']}" if machine["ranks"] > 1 else ""
    return f"{machine['processor']}, {machine['cores']} cores{ranks}; {versions}; engine {machine['engine']} ({kernel})"
