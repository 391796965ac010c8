"""Leaves are measured in groups, and their results go back into the order of the leaves."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def in_order(measured: list[mx.array], indices: Sequence[int]) -> mx.array:
    """Results of groups of leaves, leaf by leaf, on the CPU.

    Args:
        measured: of each group, float64, shape (its leaves, ...).
        indices: the number of each leaf, group after group.

    Returns:
        mlx.core.array: float64, shape (leaves, ...).
    """
    places = [0] * len(indices)
    for place, i in enumerate(indices):
        places[i] = place
    return mx.take(mx.concatenate(measured, stream=mx.cpu), mx.array(places, mx.int32), axis=0, stream=mx.cpu)
