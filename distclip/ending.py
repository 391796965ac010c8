"""The end of a distributed program: nobody waits for a rank that failed, and a good run ends with exit code 0."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from distclip.marks import mark

LEAVE_GRACE_S = 1.0  # a rank that reached its end waits so long for the others, then leaves without them
PENDING_GRACE_S = 60.0  # and so long for collectives that it began and others have not joined, then ends the job

at_end: list[Callable[[], None]] = []  # called when the process ends, the last first


def end_job_on_exception(previous: Callable[..., Any], rank: int, size: int) -> Callable[..., Any]:
    process = os.getpid()

    def excepthook(kind: type[BaseException], value: BaseException, tb: Any) -> None:
        run_callbacks(process)
        previous(kind, value, tb)
        if os.getpid() != process:  # a forked child is no rank
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            sys.stdout.flush()
        say(rank, size, f"failed with {kind.__name__}; the whole job ends")
        mark(rank, "failing", kind.__name__)
        # Anything gentler ends in MPI_Finalize, which waits for ranks that wait for this one.
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    return excepthook


def run_callbacks(process: int) -> None:
    while at_end and os.getpid() == process:
        try:
            at_end.pop()()
        except Exception:
            traceback.print_exc()  # the others are called all the same


def say(rank: int, size: int, what: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed
        print(f"distclip: rank {rank} of {size} on {socket.gethostname()} {what}.", file=sys.stderr, flush=True)


def arrange_end(group: mx.distributed.Group, library: str, stream: mx.Stream) -> None:
    """Finalize MPI after Python is gone, and wait for the other ranks only for a while.

    MLX would finalize MPI when it drops the world's group, and a sub-group that lives longer then aborts the job. So
    the world's group is never dropped, and MPI_Finalize runs from the C library's exit, after every Python object.
    """
    from mpi4py import MPI

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    farewell = MPI.COMM_WORLD.Dup()
    finalize = ctypes.cast(ctypes.CDLL(library).MPI_Finalize, ctypes.c_void_p)
    at_exit = ctypes.CDLL(None).__cxa_atexit
    at_exit.argtypes = [ctypes.c_void_p] * 3

    rank, size = farewell.rank, farewell.size
    leaving, nothing_pending = threading.Event(), threading.Event()

    def give_up() -> None:
        leaving.wait()
        if not nothing_pending.wait(PENDING_GRACE_S):
            what = "has ended with a collective under way that other ranks have not joined; the whole job ends"
            say(rank, size, what)
            mark(rank, "failing", "pending")
            os._exit(1)

    # Made now, since later Pythons start no thread at exit, and joined there, since a live one spoils the exit code.
    guard = threading.Thread(target=give_up, name="distclip-guard", daemon=True)
    guard.start()

    process = os.getpid()

    def leave() -> None:
        if os.getpid() != process:  # a forked child is no rank
            return
        leaving.set()
        if not MPI.Is_finalized():
            mx.synchronize(stream)
            arrived = farewell.Ibarrier()
            deadline = time.monotonic() + LEAVE_GRACE_S
            while not arrived.Test() and time.monotonic() < deadline:
                time.sleep(0.001)
            if not arrived.Test():
                say(rank, size, "has ended while other ranks still run; it leaves without them")
            at_exit(finalize, None, None)
        nothing_pending.set()
        guard.join()

    atexit.register(leave)
