"""The program that ``distclip doctor`` runs under mpirun: the norm of a known gradient, and the speed of each link.

``python -m distclip.cluster.selftest [links]``. Each rank reports in lines of JSON that begin with ``MARK``.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

import distclip as dc
from distclip.cluster.agent import SELF_TEST_MARK as MARK
from distclip.openmpi import find_libmpi

if TYPE_CHECKING:
    from mpi4py import MPI

PINGS = 200
MESSAGE = 4 * 2**20  # bytes
PAIR_S = 0.25  # to measure the bandwidth of a pair; at least one message each way
SLEEP_S = 0.002  # of ranks that wait for their turn, so that they leave cores and links alone


def main() -> None:
    """Report the library before MPI starts, then join the world and measure."""
    library = os.environ.get("MLX_MPI_LIBNAME") or find_libmpi()
    _report(rank=int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")), library=library, **_loaded(library))
    world = dc.init()
    from mpi4py import MPI

    _report(rank=world.rank, size=world.size, mpi4py=_cleaned(MPI.Get_library_version()), loaded=_libraries())
    grads = {"sharded": mx.full((1000,), world.rank + 1.0), "replicated": mx.full((1000,), 3.0)}
    array = dc.global_norm(grads, layout={"sharded": dc.Sharded(), "replicated": dc.Replicated()})
    norm = float(array.item())  # type: ignore[arg-type]  # MLX's item() may be complex
    expected = math.sqrt(1000 * sum((rank + 1) ** 2 for rank in range(world.size)) + 1000 * 3**2)
    _report(rank=world.rank, norm=norm.hex(), right=math.isclose(norm, expected, rel_tol=1e-6))
    if "links" in sys.argv[1:]:
        _links(MPI.COMM_WORLD)


def _loaded(library: str | None) -> dict[str, Any]:
    """Load an MPI library: its version, or the error. Does not start MPI."""
    if library is None:
        return {"error": "no Open MPI library was found"}
    text, length = ctypes.create_string_buffer(8192), ctypes.c_int()
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).MPI_Get_library_version(text, ctypes.byref(length))
    except (OSError, AttributeError) as error:
        return {"error": str(error)}
    return {"version": _cleaned(text.value.decode(errors="replace"))}


def _cleaned(version: str) -> str:
    return version.replace("\0", "").strip()


def _libraries() -> list[str]:
    """The MPI libraries that this process has loaded, where the system lists them (Linux)."""
    maps = Path("/proc/self/maps")
    paths = (line.split(maxsplit=5)[5:] for line in maps.read_text().splitlines()) if maps.exists() else ()
    return sorted({path[0] for path in paths if path and os.path.basename(path[0]).startswith("libmpi.")})


def _links(comm: MPI.Intracomm) -> None:
    """Measure the link of each pair of ranks, one after the other."""
    for low, high in itertools.combinations(range(comm.size), 2):
        if comm.rank == low:
            latency, bandwidth = _lead(comm, high)
            _report(link=[low, high], latency_us=round(latency * 1e6, 1), bandwidth_gbit_s=round(bandwidth / 1e9, 3))
        elif comm.rank == high:
            _follow(comm, low)
        arrived = comm.Ibarrier()
        while not arrived.Test():
            time.sleep(SLEEP_S)


def _lead(comm: MPI.Intracomm, peer: int) -> tuple[float, float]:
    """The latency in seconds, and the bandwidth in bits per second."""
    small, large = bytearray(1), bytearray(MESSAGE)
    times = [_round_trip(comm, small, peer) for _ in range(PINGS)]
    rounds: list[float] = []
    start, last = time.perf_counter(), False
    while not last:
        last = bool(rounds) and time.perf_counter() - start > PAIR_S
        large[0] = last
        rounds.append(_round_trip(comm, large, peer))
    return statistics.median(times) / 2, 8 * MESSAGE / (min(rounds) / 2)


def _follow(comm: MPI.Intracomm, peer: int) -> None:
    small, large = bytearray(1), bytearray(MESSAGE)
    for _ in range(PINGS):
        comm.Recv(small, peer)
        comm.Send(small, peer)
    while not large[0]:
        comm.Recv(large, peer)
        comm.Send(large, peer)


def _round_trip(comm: MPI.Intracomm, message: bytearray, peer: int) -> float:
    start = time.perf_counter()
    comm.Send(message, peer)
    comm.Recv(message, peer)
    return time.perf_counter() - start


def _report(**values: Any) -> None:
    print(MARK + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
