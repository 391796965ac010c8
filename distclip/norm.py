"""From sums over leaves to the global norm, by one all-reduce of one small vector.

``norm**2 = all_sum over the ranks of  sum over leaves of  sum_squares(leaf) / copies(leaf)``, where ``copies`` is how
many ranks hold the same block. So one reduction serves every mix of parallelism, and each parameter counts once.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from distclip.arguments import check, number
from distclip.check import check_first_call
from distclip.complete import completed
from distclip.engine import kernels
from distclip.engine.streams import Stream
from distclip.layout import Layout, Placed, Sharded, place
from distclip.mesh import Group
from distclip.schedule import schedule_of
from distclip.world import all_sum


def global_norm(
    grads: Any,
    *,
    layout: Layout = Sharded(),  # noqa: B008
    group: Group | None = None,
    norm_type: float = 2.0,
    stream: Stream = None,
) -> mx.array:
    """The norm of the whole gradient of the whole model, each parameter counted once.

    Lazy, except with several ranks and a GPU, where the host waits for it (:mod:`distclip.schedule`); traceable by
    ``mx.compile``. One collective; none when every leaf is replicated. It is collective: every
    rank of the group calls it and evaluates the result or what was scaled by it, a rank with an empty tree included.
    The first call evaluates the gradients and compares them by a tiny all-gather: replicas must not be called sharded.

    Args:
        grads: tree (dicts, lists, tuples) of arrays of any shapes and dtypes, sharded or replicated as ``layout`` says,
            not partial; ``None`` leaves are left out.
        layout: a placement for all leaves, a tree prefix of placements, or a callable ``(path, array) -> placement``.
            Default: every rank of the group holds another shard.
        group (Group, World or axis, optional): the ranks that hold the gradient together. Default: the world.
        norm_type (float): p of the p-norm, any p > 0 and ``math.inf``. Default: ``2.0``.
        stream (mlx.core.Stream, optional): where this rank's own sums are done. Default: the default device.

    Returns:
        mlx.core.array: float32, shape (), the same bits on every rank. NaN or infinite on every rank when a value on
        any rank is; with the MLX operations also infinite where a square does not fit float32.

    Raises:
        ValueError: ``norm_type`` is not above 0.
        LayoutError: the layout gives a leaf no placement, or names axes that no mesh has; or at the first call: all
            gradients are equal on all ranks and called sharded.
        TypeError: a leaf is no array.
    """
    placed = place(grads, layout, group)
    arrays = completed(placed, stream).leaves.arrays
    check_first_call("global_norm", placed, arrays)
    schedule = schedule_of(placed.agreed, stream)
    norm, _ = norm_of(arrays, placed, norm_type, stream)
    schedule.wait([norm])
    return norm


def check_norm_type(norm_type: Any) -> float:
    """The number, as Python's own, if it is above 0."""
    p = number("norm_type", norm_type)
    check(p > 0, "norm_type should be > 0 or math.inf", norm_type)
    return p


def norm_of(arrays: list[mx.array], placed: Placed, norm_type: float, stream: Stream) -> tuple[mx.array, mx.array]:
    """The global norm of leaves that are placed, and whether it is finite.

    Args:
        arrays: the leaves of this rank, or what was made of them by an average.

    Returns:
        (mlx.core.array, mlx.core.array): float32 and bool, shape (), the same bits on every rank.

    Raises:
        ValueError: ``norm_type`` is not above 0.
    """
    norm_type = check_norm_type(norm_type)
    if norm_type in (1, 2):
        return norm_of_sums(kernels.sums_of(arrays, norm_type, stream), placed, norm_type)
    largest, bad = _largest(kernels.max_abs(arrays, stream))
    if math.isinf(norm_type):
        return _finished(*_max_over_ranks(largest, bad, placed.agreed))
    return _finished(*_power_norm(arrays, placed, (largest, bad), norm_type, stream))


def norm_of_sums(sums: mx.array, placed: Placed, norm_type: float, times: float = 1.0) -> tuple[mx.array, mx.array]:
    """``times`` the norm as :func:`norm_of` has it, from the sum of powers and the count of each leaf.

    Args:
        sums: float64, shape (leaves, 2), as the engine returns them.
    """
    with mx.stream(mx.cpu):
        both = total(sums, placed.share)
        if placed.agreed is not None:  # two float64, whatever the leaves of a rank
            both = all_sum(both, placed.agreed)
        norm = root(both[0], norm_type)
        return _finished(norm if times == 1 else norm * mx.array(times, mx.float64), both[1])


def total(sums: mx.array, share: mx.array | None, members: mx.array | None = None, groups: int = 1) -> mx.array:
    """This rank's part of the sum of powers of each group of leaves, and of the count of all leaves.

    Args:
        sums: float64, shape (leaves, 2), as the engine returns them.
        share: of :class:`distclip.layout.Placed`.
        members: the group of each leaf, int32, shape (leaves,); None for one group of all leaves.

    Returns:
        mlx.core.array: float64, shape (groups + 1,).
    """
    with mx.stream(mx.cpu):
        sums = sums if share is None else sums * share
        if members is None:  # MLX 0.32.4 crashes where it sums a single row in mx.compile(..., shapeless=True)
            return mx.sum(sums, axis=0) if sums.shape[0] != 1 else mx.squeeze(sums, axis=0)
        by_group = mx.zeros(groups, mx.float64).at[members].add(sums[:, 0])
        return mx.concatenate([by_group, mx.sum(sums[:, 1:], axis=0)])


def root(powers: mx.array, norm_type: float) -> mx.array:
    """From sums of squares or magnitudes to norms."""
    return mx.sqrt(powers, stream=mx.cpu) if norm_type == 2 else powers


def slots(value: mx.array, group: mx.distributed.Group) -> mx.array:
    """A vector with a slot for each rank: this rank's value in its own, zeros in the others. On the CPU's stream."""
    return mx.where(mx.arange(group.size()) == group.rank(), value, mx.zeros((), mx.float64))


def _finished(norm: mx.array, bad: mx.array) -> tuple[mx.array, mx.array]:
    with mx.stream(mx.cpu):
        norm = norm.astype(mx.float32)
        # Finite values may have a norm beyond float32.
        return norm, mx.logical_and(bad == 0, mx.isfinite(norm))


def _largest(measured: mx.array) -> tuple[mx.array, mx.array]:
    """The largest of the leaves' largest magnitudes, and the count: float64, shape ()."""
    with mx.stream(mx.cpu):
        if measured.shape[0] == 0:
            return mx.zeros((), mx.float64), mx.zeros((), mx.float64)
        return mx.max(measured[:, 0]), mx.sum(measured[:, 1])


def _max_over_ranks(largest: mx.array, bad: mx.array, agreed: mx.distributed.Group | None) -> tuple[mx.array, mx.array]:
    """The largest of the ranks' maxima and the sum of their counts, by one all-reduce.

    ``all_max`` loses a NaN on some ranks, so each rank puts its maximum into a slot of its own, and slots are added.
    """
    if agreed is None:
        return largest, bad
    with mx.stream(mx.cpu):
        together = mx.concatenate([slots(largest, agreed), bad[None]])
        together = all_sum(together, agreed)
        return mx.max(together[:-1]), together[-1]


def _power_norm(
    arrays: list[mx.array], placed: Placed, most: tuple[mx.array, mx.array], p: float, stream: Stream
) -> tuple[mx.array, mx.array]:
    """The p-norm of any p, and the count of what is not finite: each rank sends its unit, its sum and its count.

    Values are divided by a power of two near the largest one, so that no power over- or underflows.
    """
    (largest, bad), agreed = most, placed.agreed
    with mx.stream(mx.cpu):
        usable = mx.logical_and(mx.isfinite(largest), largest > 0)
        exponent = mx.ceil(mx.log2(mx.where(usable, largest, mx.ones((), mx.float64))))
        unit = mx.power(mx.array(2.0, mx.float64), exponent)
    powers = kernels.sum_powers(arrays, p, unit, stream)
    with mx.stream(mx.cpu):
        sum_ = total(powers[:, None], placed.share)[0]
        unit = mx.where(largest == 0, largest, unit)  # zeros take any other rank's unit
        if agreed is not None:
            mine = mx.concatenate([slots(unit, agreed), slots(sum_, agreed), bad[None]])
            every = all_sum(mine, agreed)
            n = agreed.size()
            unit, sum_, bad = mx.max(every[:n]), _in_largest_unit(every[:n], every[n : 2 * n], p), every[-1]
        return unit * mx.power(sum_, 1.0 / p), bad


def _in_largest_unit(units: mx.array, sums: mx.array, p: float) -> mx.array:
    """Sums of p-th powers, each in a unit of its own, as one sum in the largest unit."""
    largest = mx.max(units)
    largest = mx.where(largest == 0, mx.array(1.0, mx.float64), largest)
    # What is not finite stays so, whatever its share.
    return mx.sum(mx.where(mx.isfinite(sums), sums * mx.power(units / largest, p), sums))
