"""Lines on standard error by which a rank tells ``distclip launch`` what it does. Imports no MLX.

A line is ``distclip-rank RANK EVENT WORD``. The shell that starts a rank writes ``started HOST`` and ``ended CODE``.
The rank writes ``overdue STEP`` and ``recovered STEP`` (its watchdog), and ``failing REASON`` before it ends the job.
"""

from __future__ import annotations

import contextlib
import os

MARK = "distclip-rank"
ENABLED = "DISTCLIP_MARKS"  # set by the launcher, which takes the lines out of what it shows


def mark(rank: int, event: str, word: object) -> None:
    """Write one line, where a launcher reads it."""
    if os.environ.get(ENABLED) == "1":
        with contextlib.suppress(OSError):
            os.write(2, f"{MARK} {rank} {event} {word}\n".encode())  # one call, so that ranks do not mix
