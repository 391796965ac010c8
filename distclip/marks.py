"""Marks: lines on standard error that a rank writes for ``distclip launch``. Imports no MLX.

A mark is ``distclip-rank RANK EVENT WORD``. The shell that starts a rank writes ``started HOST`` and ``ended CODE``.
The rank writes ``joining SIZE`` and ``joined SIZE`` (``init()``), ``overdue STEP`` and ``recovered STEP`` (its
watchdog), and ``failing REASON`` before it ends the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

MARK = "distclip-rank"
RANKS = ("OMPI_COMM_WORLD_RANK", "MLX_RANK", "PMIX_RANK")  # how launchers tell a process its rank
ENABLED = "DISTCLIP_MARKS"  # set by the launcher, which does not show the marks


def mark(rank: int, event: str, word: object) -> None:
    """Write a mark, if a launcher reads it."""
    if os.environ.get(ENABLED) == "1":
        with contextlib.suppress(OSError):
            os.write(2, f"{MARK} {rank} {event} {word}\n".encode())  # one call, so that ranks do not mix


def launched_rank(env: Mapping[str, str]) -> int:
    """The rank that a launcher gave this process, before it has joined; 0 without a launcher."""
    return next((int(env[name]) for name in RANKS if name in env), 0)
