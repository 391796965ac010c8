"""Measure how the time of clipping grows with bytes, leaves and ranks, fit a model, and extrapolate to larger jobs.

    python docs/growth.py          three minutes; writes docs/images/growth.png (needs `pip install '.[plot,test]'`)

Alone it measures the norm and the clip, under mpirun with 2, 3 and 4 ranks the bare all-reduce and average_and_clip.
Numbers for more ranks and for networks are calculated, not measured.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

import distclip as dc

ROOT = Path(__file__).parent.parent
MPIRUN = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
MPIRUN += ["--mca", "threads_pthreads_yield_strategy", "nanosleep"]
BYTES = (64 * 2**10, 2**20, 4 * 2**20, 32 * 2**20, 128 * 2**20, 512 * 2**20)
LEAVES = (1, 16, 256, 2000, 8000)
SENT = (16, 2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)
BUCKET = 4 * 2**20
BUCKETS = (2**18, 2**20, 2**22, 2**24, 2**26)
LINKS = {  # assumed: seconds for one message from one host to another, and bytes per second each way
    "Thunderbolt, IP": (50e-6, 2.0e9),
    "10 GbE": (50e-6, 1.1e9),
    "1 GbE": (100e-6, 0.11e9),
}

Point = dict[str, float]  # a measurement: "leaves", "bytes", "s"


# ------------------------------------------------------------------------------------------------ measuring


def gradient(size: int, leaves: int) -> list[mx.array]:
    return [mx.full((size // leaves // 4,), 0.5) for _ in range(leaves)]


def norm(box: list[Any]) -> Any:
    return dc.global_norm(box[0])


def clip(box: list[Any]) -> Any:
    return dc.clip_grad_norm(box.pop(), 1e-3)


def all_reduce(box: list[Any]) -> Any:
    return mx.distributed.all_sum(box.pop().pop())


def average_and_clip(box: list[Any], bucket_bytes: int = BUCKET) -> Any:
    return dc.average_and_clip(box.pop(), 1e-3, bucket_bytes=bucket_bytes)


def timed(work: Callable[[list[Any]], Any], size: int, leaves: int = 1) -> Point:
    """The median over rounds. ``work`` gets a list that alone holds the gradient."""
    rounds = 9 if size >= 2**26 else 15 if size >= 2**22 else 31
    taken = []
    for _ in range(rounds + 1):
        box = [gradient(size, leaves)]
        mx.eval(box)
        time.sleep(0.002)
        if dc.init().size > 1:
            mx.eval(mx.distributed.all_sum(mx.ones(1)))
        begin = time.perf_counter()
        result = work(box)
        mx.eval(result)
        taken.append(time.perf_counter() - begin)
        del result
    return {"bytes": size, "leaves": leaves, "s": median(taken[1:])}


def trees(sizes: Sequence[int], leaves: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, n) for size in sizes for n in leaves if size // n >= 64]


def measure_here() -> dict[str, list[Point]]:
    if dc.init().size == 1:
        return {work.__name__: [timed(work, *tree) for tree in trees(BYTES, LEAVES)] for work in (norm, clip)}
    return {
        "all_reduce": [timed(all_reduce, size) for size in SENT],
        "average_and_clip": [timed(average_and_clip, *tree) for tree in trees(SENT[2:], (1, 256, 2000))],
        "bucket_bytes": [
            timed(partial(average_and_clip, bucket_bytes=size), 2**26, 256) | {"bucket": size} for size in BUCKETS
        ],
    }


def measure(ranks: int) -> dict[str, list[Point]]:
    """Measure in new processes, so that no measurement disturbs another."""
    command = [sys.executable, str(Path(__file__)), "measure"]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *MPIRUN, *command]
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    ended = subprocess.run(command, check=True, timeout=600, stdout=subprocess.PIPE, env=environment)
    points: dict[str, list[Point]] = json.loads(ended.stdout)
    return points


# -------------------------------------------------------------------------------------------------- fitting


def fit(points: list[Point], *terms: str) -> dict[str, float]:
    """Least squares of the relative errors; no cost is negative. "fixed" is a term of every point."""
    kept = ["fixed", *terms]
    costs = dict.fromkeys(("fixed", "leaves", "bytes"), 0.0)
    while True:
        rows = np.array([[1.0 if term == "fixed" else p[term] for term in kept] for p in points])
        seconds = np.array([p["s"] for p in points])
        solution, *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(points)), rcond=None)
        if (solution >= 0).all():
            costs |= dict(zip(kept, solution.tolist(), strict=True))
            break
        kept.remove(kept[int(solution.argmin())])
    deviations = [abs(cost(costs, p) / p["s"] - 1) for p in points]
    return costs | {"median deviation": median(deviations), "largest deviation": max(deviations)}


def cost(costs: dict[str, float], p: Point) -> float:
    return sum(costs[term] * p.get(term, 1) for term in ("fixed", "leaves", "bytes"))


def show(name: str, costs: dict[str, float]) -> None:
    print(
        f"{name}: {costs['fixed'] * 1e6:.0f} us + {costs['leaves'] * 1e6:.2f} us x leaves"
        f" + {costs['bytes'] * 1e9 * 1e3:.1f} ms x GB"
        f"   (deviates by {costs['median deviation']:.0%} in the median, {costs['largest deviation']:.0%} at most)"
    )


# -------------------------------------------------------------------------------------------- extrapolation


def tree(n: int, latency: float) -> float:
    """An all-reduce of a few bytes by recursive doubling."""
    return math.ceil(math.log2(n)) * latency


def ring(n: int, size: float, latency: float, bandwidth: float) -> float:
    """An all-reduce of one bucket around a ring: 2 (n - 1) messages, one after the other."""
    return 2 * (n - 1) * (latency + size / n / bandwidth)


def halving(n: int, size: float, latency: float, bandwidth: float) -> float:
    """The same by recursive halving and doubling."""
    return 2 * math.ceil(math.log2(n)) * latency + 2 * (n - 1) / n * size / bandwidth


def extrapolate(clip: dict[str, float]) -> None:
    """Print times on networks: shards need the clip and 16 bytes, partial gradients need all their bytes.

    Args:
        clip: the fitted costs of a clip in one process.
    """
    size, leaves = 2**30, 256
    local = cost(clip, {"bytes": size, "leaves": leaves})
    print(
        f"\nCalculated, not measured: 1 GiB in {leaves} leaves on each rank; the clip alone takes {local * 1e3:.0f} ms"
    )
    print("| link | ranks | norm: all-reduce | of the clip | average: halving | ring | ring, 128 MiB | the rest |")
    for link, (latency, bandwidth) in LINKS.items():
        for n in (2, 16, 128, 1024, 4096):
            agree = tree(n, latency)
            halved = size / BUCKET * halving(n, BUCKET, latency, bandwidth)
            rings = [size / bucket * ring(n, bucket, latency, bandwidth) for bucket in (BUCKET, 32 * BUCKET)]
            added = 2 * local + agree  # to pack and unpack costs about as much again as to measure and scale
            print(
                f"| {link} | {n:,} | {agree * 1e3:.2f} ms | {agree / (local + agree):.1%} | {halved:.1f} s"
                f" | {rings[0]:.1f} s | {rings[1]:.1f} s | {added / (halved + added):.1%} |"
            )


def draw(points: dict[str, list[Point]], fits: dict[str, dict[str, float]]) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")

    def line(panel: int, color: str, label: str, name: str, leaves: int) -> None:
        mine = [p for p in points[name] if p["leaves"] == leaves]
        sizes = [p["bytes"] / 1e6 for p in mine]
        panels[panel].plot(sizes, [1e3 * p["s"] for p in mine], "o", color=color, label=label)
        panels[panel].plot(sizes, [1e3 * cost(fits[name], p) for p in mine], color=color, linewidth=1)

    for i, leaves in enumerate(LEAVES):
        line(0, f"C{i}", f"{leaves:,} {'leaf' if leaves == 1 else 'leaves'}", "clip", leaves)
    for i, n in enumerate((2, 3, 4)):
        line(1, f"C{i}", f"{n} ranks", f"all_reduce, {n} ranks", 1)
        line(2, f"C{i}", f"{n} ranks", f"average_and_clip, {n} ranks", 256)
    panels[0].set(title="clip_grad_norm, alone", xlabel="MB of gradient")
    panels[1].set(title="bare all-reduce, ranks on one machine", xlabel="MB")
    panels[2].set(title="average_and_clip, 256 leaves", xlabel="MB of gradient on each rank")
    for panel in panels:
        panel.set(xscale="log", yscale="log", ylabel="ms")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.legend()
    panels[1].set_xticks([1e-5, 1e-3, 0.1, 10])
    panels[2].set_yticks([3, 10, 30, 100])
    figure.suptitle("Dots: medians. Lines: a fixed time + a time per leaf + a time per byte", fontsize=10)
    figure.savefig(ROOT / "docs/images/growth.png", dpi=110)


def print_points(name: str, points: list[Point]) -> None:
    print(f"{name}, ms:")
    if name.startswith("bucket"):
        print("  " + ", ".join(f"{p['bucket'] / 2**20:g} MiB: {p['s'] * 1e3:.2f}" for p in points))
        return
    for size in sorted({p["bytes"] for p in points}):
        row = ", ".join(f"{p['leaves']:,}: {p['s'] * 1e3:.3f}" for p in points if p["bytes"] == size)
        print(f"  {size / 2**20:9.4g} MiB in leaves of {row}")


def main() -> None:
    points: dict[str, list[Point]] = measure(1)
    for n in (2, 3, 4):
        points |= {f"{name}, {n} ranks": measured for name, measured in measure(n).items()}
    for name, measured in points.items():
        print_points(name, measured)
    fits = {}
    for name, measured in points.items():
        if name.startswith("all_reduce"):  # a few bytes travel with the message that announces them
            fits[name] = fit([p for p in measured if p["bytes"] >= 2**12], "bytes")
        elif not name.startswith("bucket"):
            fits[name] = fit(measured, "leaves", "bytes")
    for name, costs in fits.items():
        show(name, costs)
    extrapolate(fits["clip"])
    draw(points, fits)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        here = measure_here()
        if dc.init().rank == 0:
            print(json.dumps(here))
    else:
        main()
