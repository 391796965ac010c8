"""Leaves that are partial over mesh axes are summed there, and are replicas then."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from distclip.agree import agree
from distclip.engine.buckets import BUCKET_BYTES, sum_over_ranks
from distclip.engine.native import Sums
from distclip.engine.streams import Stream
from distclip.layout import Placed, group_of
from distclip.schedule import Schedule, schedule_of
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
        schedule = schedule_of(over, stream)
        sums = sums_over(over, [placed.leaves.paths[i] for i in numbers], some, schedule)
        schedule.wait(sums.arriving)
        for i, total in zip(numbers, sums.scaled(mx.array(1.0)), strict=True):
            arrays[i] = total
    return replace(placed, leaves=placed.leaves.holding(arrays), summed={})


def sums_over(
    group: mx.distributed.Group,
    paths: list[str],
    arrays: list[mx.array],
    schedule: Schedule,
    *,
    before: float = 1.0,
    measure: bool = False,
    norm_type: float = 2.0,
    communication_dtype: mx.Dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Sums:
    """Each leaf's sum over the ranks of a group, on its way, once these have agreed on the leaves.

    Args:
        paths: of the leaves; none are needed for one rank.
        before, measure, norm_type, communication_dtype, bucket_bytes: as in
            :func:`distclip.engine.buckets.sum_over_ranks`.
    """
    return sum_over_ranks(
        arrays,
        group=group,
        before=before,
        measure=measure,
        norm_type=norm_type,
        communication_dtype=communication_dtype,
        bucket_bytes=bucket_bytes,
        stream=schedule.stream,
        communication=communication_stream(),
        order=agree(paths, arrays, group, schedule) if group.size() > 1 else None,
    )
