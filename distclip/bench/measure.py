"""Measure the parts of the bench, print the results, and write them to files."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from distclip.bench import device, machine
from distclip.bench.device import Reading
from distclip.bench.overlap import overlap
from distclip.bench.peers import Peers, average_and_clip_over, clip_shards
from distclip.bench.show import chart, memory_table, readings_table, table
from distclip.bench.step import memory, training_step
from distclip.bench.timing import Contestant, Result, interleave
from distclip.bench.trees import Grads, Tree, average_norm, equal_leaves, itemsize, trees
from distclip.records.read import strict
from distclip.world import World

About = tuple[str, str, str, str]  # the part, case, tree and dtype of a result

LEAVES = 256
FLOAT32, BFLOAT16 = ["float32"] * LEAVES, ["bfloat16"] * LEAVES
MIXED = (["float32"] * (LEAVES // 4) + ["bfloat16"] * (LEAVES // 4)) * 2


class Bench:
    """Measures the parts, shows each result as it comes, and keeps them all."""

    def __init__(self, args: argparse.Namespace, parts: set[str], world: World):
        self.args, self.parts, self.world = args, parts, world
        self.rounds = args.rounds or (3 if args.quick else 5)
        self.megabytes = args.megabytes or (64 if args.quick else 256)
        self.machine: dict[str, Any] = {}
        self.results: list[Result] = []
        self.memory: dict[str, dict[str, float]] = {}
        self.readings: list[Reading] = []
        self.left_out: list[str] = []

    def measure(self) -> None:
        stream = device.device_of(self.args.only, self.args.device) if "device" in self.parts else None
        if self.world.size == 1 and stream is not None:
            self._progress("the first use of each kernel")
            self.readings += device.first_uses(stream)  # before anything else has used one
        peers = Peers(others=self.parts != {"device"}) if self.world.size == 1 else None
        self.machine = machine.describe(peers.versions() if peers else {}, self.world)
        self._print(_headline(self.machine))
        if peers:
            self._measure_alone(peers, stream)
        else:
            if "parallel" in self.parts:
                self._measure_ranks()
            if "overlap" in self.parts:
                self._progress("averages behind a backward pass")
                for result in overlap(self.world, self.rounds * 2):
                    self._add(result)

    def _measure_alone(self, peers: Peers, stream: mx.Stream | None) -> None:
        for line in peers.missing:
            self._leave_out(line)
        if self.parts & {"norm", "clip"}:
            for tree in trees(self.megabytes, transformer=not self.args.quick):
                self._measure_tree(peers, tree, self.parts)
        if "step" in self.parts:
            self._progress("the training step")
            self._add(training_step(self.rounds * (5 if self.args.quick else 8)))
        if "memory" in self.parts:
            self._progress("memory")
            self.memory = memory(Grads(equal_leaves(self.megabytes, FLOAT32), FLOAT32))
            self._print(memory_table(self.memory, f"{LEAVES} x {self.megabytes / LEAVES:.3g} MB"))
        if stream is not None:
            self._measure_device(peers, stream)
        elif "device" in self.parts:
            self._leave_out("The part device needs a GPU, and MLX works on the CPU here")
        if self.args.only is None:
            self._leave_out("The average and the clip over several ranks need mpirun: mpirun -n 2 distclip bench")

    def _measure_device(self, peers: Peers, stream: mx.Stream) -> None:
        """Measure what a GPU costs; the norm and the clip too, where their parts do not."""
        with mx.stream(stream):
            if not self.parts & {"norm", "clip"}:
                for tree in trees(self.megabytes, transformer=not self.args.quick):
                    if tree.small or tree.dtype == "bfloat16":
                        self._measure_tree(peers, tree, {"norm", "clip"})
            grads = Grads(equal_leaves(self.megabytes, BFLOAT16), BFLOAT16)
            self._progress("scaling")
            about = ("device", "scale, given up", f"{LEAVES} x {self.megabytes / LEAVES:.3g} MB", "bfloat16")
            self._add(Result(*about, grads.bytes, grads.values, device.scaling(grads, self.rounds)))
        self._progress("launches, crossings, memory")
        self.readings += device.readings(stream, grads, self.rounds)
        self._print(readings_table(self.readings))

    def _measure_tree(self, peers: Peers, tree: Tree, parts: set[str]) -> None:
        # Each library's own gradients, the clipped ones, and those of the floors.
        needed = 9 * sum(map(math.prod, tree.shapes)) * itemsize(tree.dtype)
        if needed > machine.free_memory():
            self._leave_out(f"{tree.name} is left out: it needs {needed / 1e9:.0f} GB of free memory")
            return
        grads, rounds = Grads(tree.shapes, [tree.dtype] * len(tree.shapes)), math.ceil(self.rounds * tree.weight)
        for case in tree.cases:
            part = "norm" if case == "norm" else "clip"
            if part not in parts:
                continue
            contestants = peers.norm(grads) if part == "norm" else peers.clip(grads, case)
            if tree.small:
                too_slow = ["optax, jit"] if self.args.quick else []  # XLA compiles half a minute for 2,000 leaves
                contestants = [c for c in contestants if not c.floor and c.name not in too_slow]
            self._measure((part, case, tree.name, tree.dtype), contestants, grads, rounds, grads.norm)

    def _measure_ranks(self) -> None:
        """Measure what the ranks do together; each has a quarter of the gradient of the other parts."""
        world, megabytes = self.world, max(self.megabytes // 4, 1)
        tree = f"{LEAVES} x {megabytes / LEAVES:.3g} MB, {world.size} ranks"
        for label, dtypes in {"float32": FLOAT32, "float32 and bfloat16": MIXED}.items():
            ranks = [Grads(equal_leaves(megabytes, dtypes), dtypes, seed=rank) for rank in range(world.size)]
            cases = {"average and clip": (average_and_clip_over, average_norm(ranks))}
            if label == "float32":
                cases["clip shards"] = clip_shards, math.hypot(*(grads.norm for grads in ranks))
            mine = ranks[world.rank]
            del ranks
            for case, (contestants, norm) in cases.items():
                about = ("parallel", case, tree, label)
                self._measure(about, contestants(world, mine, norm / 2), mine, self.rounds, norm)

    def _measure(self, about: About, contestants: list[Contestant], grads: Grads, rounds: int, norm: float) -> None:
        self._progress(", ".join(about[1:]))
        series = interleave(contestants, rounds, norm, self.world.group if self.world.size > 1 else None)
        self._add(Result(*about, grads.bytes, grads.values, series))

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
                "results": [_as_dict(result) for result in self.results],
                "memory": self.memory,
                "device": [asdict(reading) for reading in self.readings],
            }
            self.args.json.write_text(json.dumps(strict(everything), indent=1, allow_nan=False) + "\n")
            print(f"every sample is in {self.args.json}")
        if self.args.chart:
            results = [result for result in self.results if result.part not in ("step", "overlap")]
            chart(results, _headline(self.machine), self.args.chart)
            print(f"the chart is in {self.args.chart}")


def _as_dict(result: Result) -> dict[str, Any]:
    series = []
    for s in result.series:
        ratios = {"times_distclip": s.median / result.baseline, "bytes_per_s": result.bytes / s.median}
        series.append(asdict(s) | {"median_s": s.median} | ratios)
    return asdict(result) | {"series": series}


def _headline(machine: dict[str, Any]) -> str:
    how = {
        "native": f"{machine['instructions']}, {machine['threads']} threads",
        "gpu": "kernels for Metal and CUDA",
        "mlx": "MLX operations",
    }
    engine = f"engine {machine['engine']} ({how[machine['engine']]})"
    names = ("distclip", "mlx", "torch", "jax", "optax", "numpy")
    versions = ", ".join(f"{name} {machine[name]}" for name in names if name in machine)
    ranks = f", {machine['ranks']} ranks over {machine['backend']}" if machine["ranks"] > 1 else ""
    return f"{machine['processor']}, {machine['cores']} cores{ranks}; {versions}; {engine}"
