"""From local sums to the global norm, by one all-reduce of one small vector.

``norm**2 = all_sum over the ranks of  sum over leaves of  sum_squares(leaf) / copies(leaf)``, where ``copies`` is how
many ranks hold the same piece. So one reduction serves every mix of parallelism, and each parameter counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import reduce
from typing import Any

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.operations import Stream
from distclip.layout import Layout, Placement, Sharded, communicates, copies, placements
from distclip.tree import arrays
from distclip.world import init

Pair = tuple[mx.array, mx.array]  # float64, shape () each
Weighted = list[tuple[float, list[mx.array]]]  # leaves, and what their sum of squares counts in the global sum


def global_norm(
    grads: Any,
    *,
    layout: Layout = Sharded(),  # noqa: B008
    group: mx.distributed.Group | None = None,
    norm_type: float = 2.0,
    stream: Stream = None,
) -> mx.array:
    """The norm of the whole gradient of the whole model, each parameter counted once.

    Lazy, and traceable by ``mx.compile``. One collective; none when every leaf is replicated. It is collective: every
    rank of the group calls it and evaluates the result or what was scaled by it, a rank with an empty tree included.

    Args:
        grads: tree (dicts, lists, tuples) of arrays of any shapes and dtypes, sharded or replicated as ``layout`` says,
            not partial; ``None`` leaves are passed over.
        layout: a placement for all leaves, a tree prefix of placements, or a callable ``(path, array) -> placement``.
            Default: every rank of the group holds another shard.
        group (mlx.core.distributed.Group, optional): the ranks that hold the gradient together. Default: the world.
        norm_type (float): p of the p-norm, any p > 0 and ``math.inf``. Default: ``2.0``.
        stream (mlx.core.Stream, optional): where this rank's own sums are done. Default: the default device.

    Returns:
        mlx.core.array: float32, shape (), the same bits on every rank. NaN or infinite on every rank when a value on
        any rank is; with the MLX operations also infinite where a square does not fit float32.

    Raises:
        ValueError: ``norm_type`` is not above 0.
        LayoutError: the layout says nothing of a leaf, or names axes that no mesh has.
        TypeError: a leaf is no array.
    """
    return measure(grads, layout, group, norm_type, stream)[0]


def measure(
    grads: Any, layout: Layout, group: mx.distributed.Group | None, norm_type: float, stream: Stream
) -> tuple[mx.array, mx.array, mx.distributed.Group | None]:
    """The global norm (float32, shape ()), whether it is finite on all ranks (bool, shape ()), and the group that
    agreed on both, or None where every leaf is replicated and nothing was sent."""
    group = init().group if group is None else group
    leaves = arrays(grads)
    placed = placements(grads, layout, len(leaves))
    weighted = weigh(leaves, placed, group)
    agreed = group if group.size() > 1 and communicates(layout, placed) else None
    if agreed is None:  # nothing is added over ranks, so nothing is counted more than once
        weighted = [(1.0, alike) for _, alike in weighted]
    return *norm_of(weighted, agreed, norm_type, stream), agreed


def weigh(leaves: list[mx.array], placed: list[Placement], group: mx.distributed.Group) -> Weighted:
    """Leaves that lie as ``placed`` says, by the copies that ranks hold of them: with n copies each counts 1/n."""
    if len(set(map(id, placed))) == 1:
        return [(1.0 / copies(placed[0], group), leaves)]
    known = {id(placement): copies(placement, group) for placement in {id(p): p for p in placed}.values()}
    by_copies: dict[int, list[mx.array]] = defaultdict(list)
    for leaf, placement in zip(leaves, placed, strict=True):
        by_copies[known[id(placement)]].append(leaf)
    return [(1.0 / n, alike) for n, alike in by_copies.items()]


def norm_of(
    weighted: Weighted, group: mx.distributed.Group | None, norm_type: float, stream: Stream
) -> tuple[mx.array, mx.array]:
    """The norm of weighted leaves over the ranks of a group (None: of this rank alone), and whether it is finite.

    Args:
        weighted: ``(weight, leaves)`` pairs; a leaf's sum of powers counts ``weight`` times.

    Raises:
        ValueError: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type should be > 0 or math.inf, {norm_type} was provided instead")
    if norm_type in (1, 2):
        local = kernels.sum_squares if norm_type == 2 else kernels.sum_abs
        sums = [(weight, local(leaves, stream)) for weight, leaves in weighted]
        return norm_of_sums(sums, group, norm_type)
    if math.isinf(norm_type):
        norm, bad = _reduce_max(kernels.max_abs([leaf for _, leaves in weighted for leaf in leaves], stream), group)
    else:
        norm, bad = _power_norm(weighted, norm_type, group, stream)
    return _finished(norm, bad)


def norm_of_sums(
    sums: list[tuple[float, mx.array]], group: mx.distributed.Group | None, norm_type: float, times: float = 1.0
) -> tuple[mx.array, mx.array]:
    """``times`` the norm as :func:`norm_of` has it, from what the leaves were measured as: sums of powers and counts,
    float64, shape (2,)."""
    local = added(sums)
    with mx.stream(mx.cpu):
        if group is not None:  # two float64, whatever a rank holds
            local = mx.distributed.all_sum(local, group=group, stream=mx.cpu)
        total, bad = local[0], local[1]
        norm = mx.sqrt(total) if norm_type == 2 else total
        return _finished(norm if times == 1 else norm * mx.array(times, mx.float64), bad)


def added(sums: list[tuple[float, mx.array]]) -> mx.array:
    """Weighted sums of powers, and their counts, as one: float64, shape (2,)."""
    with mx.stream(mx.cpu):
        parts = [s if weight == 1 else s * mx.array([weight, 1.0], mx.float64) for weight, s in sums]
        return reduce(mx.add, parts) if parts else mx.zeros(2, mx.float64)


def _finished(norm: mx.array, bad: mx.array) -> tuple[mx.array, mx.array]:
    with mx.stream(mx.cpu):
        norm = norm.astype(mx.float32)
        # Finite values may have a norm beyond float32.
        return norm, mx.logical_and(bad == 0, mx.isfinite(norm))


def _power_norm(weighted: Weighted, p: float, group: mx.distributed.Group | None, stream: Stream) -> Pair:
    """The p-norm of any p, and the count of what is not finite: each rank sends its unit, its sum and its count."""
    local = [(weight, kernels.sum_powers(leaves, p, stream)) for weight, leaves in weighted or [(1.0, [])]]
    with mx.stream(mx.cpu):
        units, sums = [unit for _, (unit, _, _) in local], [total * weight for weight, (_, total, _) in local]
        unit, total = _in_one_unit(mx.stack(units), mx.stack(sums), p)
        bad = reduce(mx.add, [bad for _, (_, _, bad) in local])
        if group is not None:
            mine = mx.concatenate([slots(unit, group), slots(total, group), bad[None]])
            all_ranks = mx.distributed.all_sum(mine, group=group, stream=mx.cpu)
            n = group.size()
            unit, total = _in_one_unit(all_ranks[:n], all_ranks[n : 2 * n], p)
            bad = all_ranks[-1]
        return unit * mx.power(total, 1.0 / p), bad


def _in_one_unit(units: mx.array, sums: mx.array, p: float) -> Pair:
    """The largest unit (1 where all are 0), and sums of p-th powers, each in a unit of its own, as one sum in it."""
    largest = mx.max(units)
    largest = mx.where(largest == 0, mx.array(1.0, mx.float64), largest)
    # What is not finite stays so, whatever its share.
    parts = mx.where(mx.isfinite(sums), sums * mx.power(units / largest, p), sums)
    return largest, mx.sum(parts)


def _reduce_max(local: mx.array, group: mx.distributed.Group | None) -> Pair:
    """Take the largest of the ranks' maxima and the sum of their counts, by one all-reduce.

    ``all_max`` loses a NaN on some ranks, so every rank puts its maximum into a slot of its own, and slots are added.
    """
    with mx.stream(mx.cpu):
        if group is None:
            return local[0], local[1]
        together = mx.concatenate([slots(local[0], group), local[1][None]])
        together = mx.distributed.all_sum(together, group=group, stream=mx.cpu)
        return mx.max(together[:-1]), together[-1]


def slots(value: mx.array, group: mx.distributed.Group) -> mx.array:
    """One place for each rank, this rank's value in its own and zeros in the others. Runs on the CPU's stream."""
    return mx.where(mx.arange(group.size()) == group.rank(), value, mx.zeros((), mx.float64))
