"""Measure the ``mx.distributed.sum_scatter`` that distclip supplies on MPI, beside an all-sum and a slice.

    mpirun -n 4 --hostfile hosts python docs/scatter.py         a minute or less; prints the rows of a Markdown table

The two take turns in one run, on float32 arrays of 1 to 64 MiB: first with the memory that MLX keeps for reuse on Linux
by default (32 MiB), then with 1 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

import distclip as dc
from distclip.bench.timing import Contestant, Function, interleave, work_of

ROUNDS = 15
SIZES_MIB = 1, 4, 16, 64
CACHES_MIB = 32, 1024


def all_sum_and_slice(x: mx.array) -> tuple[mx.array, None]:
    group, stream = dc.init().group, dc.init().stream
    rows = x.shape[0] // group.size()
    total = mx.distributed.all_sum(x, group=group, stream=stream)
    with mx.stream(stream):
        return total[group.rank() * rows : (group.rank() + 1) * rows], None


def sum_scatter(x: mx.array) -> tuple[mx.array, None]:
    return mx.distributed.sum_scatter(x), None


def array_of(mib: int, ranks: int) -> Callable[[], Any]:
    def array() -> mx.array:
        x = mx.ones((ranks, mib * 2**18 // ranks))
        mx.eval(x)
        return x

    return array


def main() -> None:
    world = dc.init()
    if world.size == 1:
        raise SystemExit("docs/scatter.py measures links between ranks: mpirun -n 4 python docs/scatter.py")
    forms: dict[str, Function] = {"all-sum": all_sum_and_slice, "sum_scatter": sum_scatter}
    for cache in CACHES_MIB:
        mx.set_cache_limit(cache * 2**20)
        for mib in SIZES_MIB:
            contestants = [Contestant(name, array_of(mib, world.size), work_of(form)) for name, form in forms.items()]
            all_sum, scattered = (series.median * 1e3 for series in interleave(contestants, ROUNDS, None, world.group))
            if world.rank == 0:
                ratio = all_sum / scattered
                print(f"| {cache} MiB | {mib} MiB | {all_sum:.1f} ms | {scattered:.1f} ms | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
