"""Measure gradient clipping on this machine: distclip, MLX, PyTorch and optax in turns, beside plain reads and copies.

Alone it measures the norm, the clip, the training step of launch/train.py and memory; under mpirun, what several ranks
do together:

    distclip bench
    mpirun -n 2 distclip bench

Each number is the median of several rounds, in which every contestant has its turn. "given up": the caller keeps no
reference to the gradients, so that their memory can be used again (PyTorch: in place; optax: donated). "kept": the
caller's gradients stay as they are. "no clip": the norm is below max_norm. "rel. error" is that of the norm, against
float64. A contestant finds the caches full of what others worked on, as after a backward pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from distclip.records.strict import strict
from distclip.world import World, init, launched_by

if TYPE_CHECKING:
    from distclip.bench.timing import Result

PARTS = ("norm", "clip", "step", "memory", "parallel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"measure only these: {', '.join(PARTS)}")
    add("--rounds", type=_positive, metavar="N", help="turns of each contestant that count (default: 5; quick: 3)")
    add("--megabytes", type=_positive, metavar="N", help="size of the large gradients (default: 256; quick: 64)")
    add("--quick", action="store_true", help="fewer rounds, smaller gradients, no transformer: a minute or less")
    add("--device", choices=["cpu", "gpu"], help="where MLX and distclip work (default: MLX's own default)")
    add("--json", type=_file, metavar="FILE", help="write every sample, and what they were measured on")
    add("--chart", type=_picture, metavar="FILE.png", help="draw the result")


def run(args: argparse.Namespace) -> int:
    parts = set(args.only or PARTS)
    several = launched_by(os.environ)[1] != 1
    if args.only and several and parts != {"parallel"}:
        args.error(f"--only {' '.join(args.only)}: on several ranks only parallel is measured")
    if args.only and not several and "parallel" in parts:
        args.error("--only parallel needs several ranks: mpirun -n 2 distclip bench --only parallel")
    for module, needed in (("numpy", True), ("matplotlib", args.chart is not None)):
        if needed and importlib.util.find_spec(module) is None:
            sys.exit(f'distclip bench needs {module} here: pip install "distclip[bench]"')
    if args.device:
        if args.device == "gpu" and not mx.is_available(mx.gpu):
            args.error("--device gpu: MLX has no GPU here")
        mx.set_default_device(getattr(mx, args.device))
    # Before NumPy's first import: its dot product is the floor of one thread.
    for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(variable, "1")
    _Run(args, parts, init()).all()
    return 0


class _Run:
    def __init__(self, args: argparse.Namespace, parts: set[str], world: World):
        self.args, self.parts, self.world = args, parts, world
        self.rounds = args.rounds or (3 if args.quick else 5)
        self.megabytes = args.megabytes or (64 if args.quick else 256)
        self.results: list[Result] = []
        self.memory: dict[str, dict[str, float]] = {}
        self.left_out: list[str] = []

    def all(self) -> None:
        from distclip.bench import machine

        if self.world.size > 1:
            libraries: dict[str, str] = {}
            self.about = machine.describe(libraries, self.world)
            self._print(_headline(self.about))
            self._parallel()
        else:
            from distclip.bench.peers import Peers

            peers = Peers()
            self.left_out += peers.missing
            self.about = machine.describe(peers.versions(), self.world)
            self._print(_headline(self.about), *self.left_out)
            if self.parts & {"norm", "clip"}:
                self._norm_and_clip(peers)
            if "step" in self.parts:
                self._step()
            if "memory" in self.parts:
                self._memory()
            if self.args.only is None:
                self._leave_out("What several ranks do together is measured under mpirun: mpirun -n 2 distclip bench")
        if self.world.rank == 0:
            self._write()

    def _norm_and_clip(self, peers: Any) -> None:
        from distclip.bench import machine
        from distclip.bench.timing import Result, interleave
        from distclip.bench.trees import Grads, trees

        for tree in trees(self.megabytes, transformer=not self.args.quick):
            needed = 9 * tree.bytes  # each library's own gradients, what they are clipped to, and the floors'
            if needed > machine.free_memory():
                self._leave_out(f"{tree.name} is left out: it needs {needed / 1e9:.0f} GB of free memory")
                continue
            grads = Grads(tree.shapes, [tree.dtype] * len(tree.shapes))
            for case in tree.cases:
                if ("norm" if case == "norm" else "clip") not in self.parts:
                    continue
                self._progress(f"{case} of {tree.name}, {tree.dtype}")
                if case == "norm":
                    contestants = peers.norm(grads)
                else:
                    max_norm = grads.norm * (2 if case.startswith("no clip") else 0.5)
                    contestants = peers.clip(grads, max_norm, given_up="given up" in case)
                if tree.small:
                    contestants = [one for one in contestants if not one.floor and not self._too_slow(one.name)]
                series = interleave(contestants, math.ceil(self.rounds * tree.weight), grads.norm)
                part = "norm" if case == "norm" else "clip"
                self._found(Result(part, case, tree.name, tree.dtype, grads.bytes, grads.values, series))

    def _too_slow(self, name: str) -> bool:
        return self.args.quick and name.startswith("optax")  # XLA compiles half a minute for 2,000 leaves

    def _step(self) -> None:
        from distclip.bench.step import training_step

        self._progress("the training step")
        try:
            self._found(training_step(self.rounds * (5 if self.args.quick else 8)))
        except ImportError as error:
            self._leave_out(f"The training step is left out: {error}")

    def _memory(self) -> None:
        from distclip.bench.show import memory_table
        from distclip.bench.step import memory
        from distclip.bench.trees import Grads

        size = max(self.megabytes * 10**6 // 256 // 4, 1)
        self._progress("memory")
        self.memory = memory(Grads([(size,)] * 256, ["float32"] * 256))
        self._print(memory_table(self.memory, f"256 x {self.megabytes / 256:.3g} MB"))

    def _parallel(self) -> None:
        from distclip.bench import parallel

        for result in parallel.results(self.world, max(self.megabytes // 4, 1), self.rounds, self._progress):
            self._found(result)

    def _found(self, result: Result) -> None:
        from distclip.bench.show import table

        self.results.append(result)
        self._print(table(result))

    def _leave_out(self, why: str) -> None:
        self.left_out.append(why)
        self._print(why)

    def _print(self, *texts: str) -> None:
        if self.world.rank == 0:
            self._progress("")
            print("\n".join(texts), end="\n\n", flush=True)

    def _progress(self, what: str) -> None:
        """What is going on, on a line that the next result takes."""
        if self.world.rank == 0 and sys.stderr.isatty():
            print(f"\r{what and what + ' ...'}\x1b[K", end="", file=sys.stderr, flush=True)

    def _write(self) -> None:
        if self.args.json:
            results = [
                asdict(result) | {"series": [_series(one, result) for one in result.series]} for result in self.results
            ]
            everything = {
                "command": ["distclip", *sys.argv[1:]],
                "machine": self.about,
                "rounds": self.rounds,
                "left_out": self.left_out,
                "results": results,
                "memory": self.memory,
            }
            self.args.json.write_text(json.dumps(strict(everything), indent=1, allow_nan=False) + "\n")
            print(f"every sample is in {self.args.json}")
        if self.args.chart:
            from distclip.bench.show import chart

            chart([one for one in self.results if one.part != "step"], _headline(self.about), self.args.chart)
            print(f"the chart is in {self.args.chart}")


def _series(one: Any, result: Result) -> dict[str, Any]:
    return asdict(one) | {
        "median_s": one.median,
        "times_distclip": one.median / result.baseline,
        "bytes_per_s": result.bytes / one.median,
    }


def _headline(about: dict[str, Any]) -> str:
    kernel = f"{about['instructions']}, {about['threads']} threads" if about["instructions"] else "MLX operations"
    names = ("distclip", "mlx", "torch", "jax", "optax", "numpy")
    versions = ", ".join(f"{name} {about[name]}" for name in names if name in about)
    ranks = f", {about['ranks']} ranks over {about['backend']}" if about["ranks"] > 1 else ""
    return f"{about['processor']}, {about['cores']} cores{ranks}; {versions}; engine {about['engine']} ({kernel})"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text} should end in .png, .svg or .pdf")
    return _file(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path
