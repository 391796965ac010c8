"""One text of each rank, on every rank."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


def gather_text(text: str, group: mx.distributed.Group) -> list[str]:
    """The text of every rank, in the order of the ranks. Two all-gathers: lengths, then bytes."""
    raw = text.encode()
    lengths: Any = mx.distributed.all_gather(mx.array([len(raw)], mx.int32), group=group).tolist()
    padded = mx.array(list(raw.ljust(max(lengths))), mx.uint8)[None]
    gathered: Any = mx.distributed.all_gather(padded, group=group).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(gathered, lengths, strict=True)]
