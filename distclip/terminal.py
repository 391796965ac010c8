"""Does a person look on? Imports no MLX."""

from __future__ import annotations

import os
from typing import TextIO


def on_terminal(file: TextIO) -> bool:
    """Whether a person looks on: mpirun gives every rank a terminal of no size, and what starts it says what is behind.

    ``launch/local.sh`` and ``distclip launch`` do, by ``DISTCLIP_TERMINAL=1``.
    """
    if not file.isatty():
        return False
    return os.get_terminal_size(file.fileno()).columns > 0 or os.environ.get("DISTCLIP_TERMINAL") == "1"
