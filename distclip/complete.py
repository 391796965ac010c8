"""Leaves that are partial over mesh axes are summed there, and are replicas then."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from distclip.agree import agree
from distclip.engine.buckets import BUCKET_BYTES, sum_over_ranks
from distclip.engine.streams import Stream
from distclip.layout import Placed, group_of
from distclip.schedule import schedule_of
from distclip.world import communication_stream


def floating(arrays: list[mx.array], stream: Stream) -> list[mx.array]:
    """Integers as float32, since a sum may not fit their type and a mean is no integer."""
    return [x if mx.issubdtype(x.dtype, mx.inexact) else x.astype(mx.float32, stream=stream) for x in arrays]


def completed(placed: Placed, stream: Stream) -> Placed:
    """The leaves, partial ones summed over their axes: one bucketed collective for each set of axes."""
    if not placed.summed:
        return placed
    arrays = list(placed.leaves.arrays)
    for placement, numbers in placed.summed.items():
        over = group_of(placement, placed.group)
        some = floating([arrays[i] for i in numbers], stream)
        schedule = schedule_of(some, over, stream)
        sums = sum_over_ranks(
            some,
            group=over,
            before=1.0,
            measure=False,
            communication_dtype=None,
            bucket_bytes=BUCKET_BYTES,
            stream=stream,
            communication=communication_stream(),
            order=agree([placed.leaves.paths[i] for i in numbers], some, over, schedule),
        )
        if schedule.waits:
            schedule.wait(sums.arriving)
        for i, total in zip(numbers, sums.scaled(mx.array(1.0)), strict=True):
            arrays[i] = total
    return replace(placed, leaves=placed.leaves.holding(arrays), summed={})
