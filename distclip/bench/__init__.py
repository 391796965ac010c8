"""Measure gradient clipping on this machine: distclip, MLX, PyTorch and optax in turns, beside plain reads and copies.

Alone it measures the norm, the clip, the training step of a small transformer, memory, and what a GPU costs; under
mpirun, the average and the clip over all ranks, and what of the average is hidden behind a backward pass:

    distclip bench
    mpirun -n 2 distclip bench
    distclip bench --device gpu --only device --json mac.json

Each number is the median of several rounds, in which every contestant has its turn. "given up": the caller keeps no
reference to the gradients, so that their memory can be used again (PyTorch: in place; optax: donated). "kept": the
caller's gradients stay as they are. "no clip": the norm is below max_norm. "memory": the peak of MLX's memory above the
gradients, as a part of their size. "rel. error" is that of the norm, against float64. "distclip (gpu)", "(native)" and
"(mlx)" are its engines; the first is the one that works by itself. The caches are full of the data of other
contestants, as they are after a backward pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from functools import partial
from pathlib import Path

PARTS = ("norm", "clip", "step", "memory", "device", "parallel", "overlap")
RANKS = {"parallel", "overlap"}  # that need several


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"measure only these: {', '.join(PARTS)}")
    add("--rounds", type=_positive, metavar="N", help="turns of each contestant (default: 5; quick: 3)")
    add("--megabytes", type=_positive, metavar="N", help="size of the large gradients (default: 256; quick: 64)")
    add("--quick", action="store_true", help="fewer rounds, smaller gradients, no transformer: a minute or less")
    add("--device", choices=["cpu", "gpu"], help="of MLX and distclip (default: MLX's own default)")
    add("--json", type=_file, metavar="FILE", help="write every sample, and a description of the machine")
    add("--chart", type=partial(_file, suffixes=(".png", ".svg", ".pdf")), metavar="FILE.png", help="draw the result")


def run(args: argparse.Namespace) -> int:
    try:
        import mlx.core as mx

        from distclip.world import init, launched_by
    except ImportError as error:
        sys.exit(f"distclip bench cannot start: {error}; `distclip doctor` says what to do")
    parts = set(args.only or PARTS)
    several = launched_by(os.environ)[1] != 1
    if args.only and several and parts - RANKS:
        args.error(f"--only {' '.join(args.only)}: on several ranks only parallel and overlap are measured")
    if args.only and not several and parts & RANKS:
        needs = " ".join(part for part in args.only if part in RANKS)
        args.error(f"--only {needs} needs several ranks: mpirun -n 2 distclip bench --only {needs}")
    for module, needed in (("numpy", True), ("matplotlib", args.chart is not None)):
        if needed and importlib.util.find_spec(module) is None:
            sys.exit(f"distclip bench needs {module} here: pip install {module}")
    if args.device:
        if args.device == "gpu" and not mx.is_available(mx.gpu):
            args.error("--device gpu: MLX has no GPU here")
        mx.set_default_device(getattr(mx, args.device))
    for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(variable, "1")  # NumPy's dot product is the floor with a single thread
    from distclip.bench.measure import Bench

    bench = Bench(args, parts, init())
    bench.measure()
    if bench.world.rank == 0:
        bench.write()
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _file(text: str, suffixes: tuple[str, ...] = ()) -> Path:
    path = Path(text)
    if suffixes and path.suffix not in suffixes:
        raise argparse.ArgumentTypeError(f"{text} should end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path
