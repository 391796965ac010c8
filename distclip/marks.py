"""Marks: lines on standard error that a rank writes for ``distclip launch``. Imports no MLX.

A mark is ``distclip-rank RANK EVENT WORD``. The shell that starts a rank writes ``started HOST`` and ``ended CODE``.
The rank writes ``overdue STEP`` and ``recovered STEP`` (its watchdog), and ``failing REASON`` before it ends the job.
"""

from __future__ import annotations

import contextlib
import os

MARK = "distclip-rank"
ENABLED = "DISTCLIP_MARKS"  # set by the launcher, which does not show the marks


def mark(rank: int, event: str, word: object) -> None:
    """Write a mark, if a launcher reads it."""
    if os.environ.get(ENABLED) == "1":
        with contextlib.suppress(OSError):
            os.write(2, f"{MARK} {rank} {event} {word}\n".encode())  # one call, so that ranks do not mix
