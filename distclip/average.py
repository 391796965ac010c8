"""Data parallel training: from each rank's partial gradients to their average, and to the clipped average."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from distclip.arguments import check, scalar, whole
from distclip.check import check_first_call
from distclip.complete import completed, floating, sums_over
from distclip.engine.buckets import BUCKET_BYTES
from distclip.engine.native import Sums
from distclip.engine.order import in_order
from distclip.engine.streams import Stream
from distclip.layout import Layout, LayoutError, Placed, Replicated, mesh_of, place
from distclip.mesh import MESHES, Group, as_group
from distclip.norm import check_norm_type, norm_of, norm_of_sums
from distclip.policy import check_policy, checked_max_norm, factor_of, raise_if_bad
from distclip.schedule import Schedule, schedule_of
from distclip.world import all_sum


def average_gradients(
    grads: Any,
    group: Group | None = None,
    *,
    weight: float | mx.array | None = None,
    communication_dtype: mx.Dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    stream: Stream = None,
) -> Any:
    """The mean of the ranks' gradients: each leaf is partial before and a replica after.

    The counterpart of ``mlx.nn.average_gradients``, which falls back to one all-reduce per leaf when a tree mixes
    types; here each dtype has its buckets. Lazy, and traceable by ``mx.compile``. The first call with a tree also
    compares the ranks' trees (one tiny all-gather).

    With several ranks and a GPU (:mod:`distclip.schedule`) it is not lazy: each bucket is sent as soon as the backward
    pass has made its gradients, and the host waits for all of them. So call it before the gradients are evaluated:
    the average then travels while the backward pass runs. Every call compares the ranks' trees then.

    Args:
        grads: tree of arrays of any shapes and dtypes, partial, the same paths, shapes and dtypes on every rank;
            ``None`` leaves stay None.
        group (Group, World or axis, optional): the ranks to average over. Default: the world.
        weight (float or scalar array, optional): how much this rank counts, >= 0, such as the rows or tokens of its
            batch: the mean is then ``sum(weight * gradient) / sum(weight)``. Every rank gives one, and it adds one tiny
            collective. The gradients of a rank of weight 0 count as zeros, whatever they are. Default: all count alike.
        communication_dtype (mlx.core.Dtype, optional): send floating leaves in this type (bfloat16 halves the bytes
            of float32; float32 keeps the sum of bfloat16 leaves exact). Default: each leaf's own.
        bucket_bytes (int): leaves of one dtype are sent together until they reach this size, and larger ones alone.
            0: each leaf alone. Default: 4 MiB, and with a GPU at least about 1/32 of the tree.
        stream (mlx.core.Stream, optional): where the arithmetic runs. Default: the default device.

    Returns:
        The averaged gradients in the same tree, floating types kept, integers as float32.

    Raises:
        LayoutError: the ranks hold different trees at the first call with a tree. Later calls with a tree that was
            compared do not compare again, except with a GPU, so ranks must not come to differ.
        TypeError: ``communication_dtype`` is no floating dtype, or a leaf is no array.
    """
    check_communication_dtype(communication_dtype)
    check_weight(weight)
    group = as_group(group)
    placed = place(grads, Replicated(), group, named=group.size() > 1)
    if group.size() == 1:
        return placed.leaves.rebuild(floating(placed.leaves.arrays, stream))
    average = Average(
        placed,
        group,
        measure=False,
        weight=weight,
        communication_dtype=communication_dtype,
        bucket_bytes=bucket_bytes,
        stream=stream,
    )
    return placed.leaves.rebuild(average.scaled(mx.array(1.0)))


def average_and_clip(
    grads: Any,
    max_norm: float | mx.array,
    *,
    group: Group | None = None,
    layout: Layout = Replicated(),  # noqa: B008
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    weight: float | mx.array | None = None,
    communication_dtype: mx.Dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    stream: Stream = None,
) -> tuple[Any, mx.array]:
    """Average the ranks' gradients and clip the average by its global norm, in one go.

    Equals ``clip_grad_norm(average_gradients(grads), max_norm, layout=layout)``, but the norm is taken of the
    buckets as they arrive and the division by the number of ranks is part of the scale. Lazy, except with several
    ranks and a GPU, as :func:`average_gradients` is; traceable by ``mx.compile`` except with ``"raise"``. A
    replicated layout adds no collective to those of the buckets, a sharded one adds one, and at the first call it
    evaluates and compares, as :func:`distclip.global_norm` does.

    Args:
        grads: tree of arrays, partial over ``group``, the same paths, shapes and dtypes on every rank of it.
        max_norm (float or scalar array): the largest norm of the average allowed, the same on every rank.
        group (Group, World or axis, optional): the ranks to average over. Default: the world.
        layout: the placement of the leaves once averaged: ``Replicated()`` for plain data parallel training,
            ``Sharded("tp")`` for leaves that are split over another mesh axis than the one averaged over.
        norm_type (float): as in :func:`distclip.clip_grad_norm`.
        nonfinite (str): as in :func:`distclip.clip_grad_norm`.
        weight (float or scalar array, optional): as in :func:`average_gradients`.
        communication_dtype (mlx.core.Dtype, optional): as in :func:`average_gradients`.
        bucket_bytes (int): as in :func:`average_gradients`.
        stream (mlx.core.Stream, optional): as in :func:`average_gradients`.

    Returns:
        (tree, mlx.core.array): the clipped average in the same tree, and its norm before clipping, float32, shape ().

    Raises:
        LayoutError: the ranks hold different trees, or a leaf is called sharded over ranks it is averaged over, or at
            the first call: all averages are equal on all ranks and called sharded.
        ValueError, FloatingPointError: as in :func:`distclip.clip_grad_norm`.
    """
    max_norm = checked_max_norm(max_norm)
    check_policy(nonfinite)
    check_communication_dtype(communication_dtype)
    group = as_group(group)
    placed = place(grads, layout, None, named=group.size() > 1)
    average = Average(
        placed,
        group,
        norm_type=norm_type,
        weight=weight,
        communication_dtype=communication_dtype,
        bucket_bytes=bucket_bytes,
        stream=stream,
    )
    norm, finite = average.norm()
    if nonfinite == "raise":
        raise_if_bad(placed, norm, finite, norm_type, averaged=group)
    scaled = average.scaled(*factor_of(norm, finite if nonfinite == "zero" else None, max_norm, average.schedule))
    check_first_call("average_and_clip", placed, scaled, agreed=[norm])
    return placed.leaves.rebuild(scaled), norm


class Average:
    """The average of leaves over the ranks of a group, on its way: measured, and then scaled, without being formed.

    Args:
        placed: the partial leaves, with the placement of each once averaged.
        group: the ranks to average over.
        measure: whether the norm will be asked for.
        norm_type, weight, communication_dtype, bucket_bytes, stream: as in :func:`average_and_clip`.
    """

    def __init__(
        self,
        placed: Placed,
        group: mx.distributed.Group,
        *,
        measure: bool = True,
        norm_type: float = 2.0,
        weight: float | mx.array | None = None,
        communication_dtype: mx.Dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        stream: Stream = None,
    ) -> None:
        norm_type = check_norm_type(norm_type)
        if group.size() == 1:
            placed = completed(placed, stream)
        arrays = floating(placed.leaves.arrays, stream)
        self.schedule = schedule_of(group if group.size() > 1 else placed.agreed, stream)
        before, self._after = _parts_of_mean(arrays, communication_dtype, group.size())
        check_weight(weight)
        if weight is not None and group.size() > 1:
            arrays, before, self._after = _weighted(arrays, weight, group, self.schedule), 1.0, 1.0
        self._placed, self._norm_type = placed, norm_type
        self._parts: list[tuple[list[int], Sums]] = []
        paths = placed.leaves.paths if group.size() > 1 else []
        for over, numbers in _groups(placed, group):
            sums = sums_over(
                over,
                [paths[i] for i in numbers] if paths else [],
                [arrays[i] for i in numbers],
                self.schedule,
                before=before,
                measure=measure,
                norm_type=norm_type,
                communication_dtype=communication_dtype,
                bucket_bytes=whole("bucket_bytes", bucket_bytes, 0),
            )
            self._parts.append((numbers, sums))

    @property
    def measured(self) -> mx.array:
        """The sum of powers of each leaf's average, and its count of what is not finite: float64, shape (leaves, 2)."""
        if self._after == 1:
            return self._measured
        power = mx.array([self._after**self._norm_type, 1.0], mx.float64)
        return mx.multiply(self._measured, power, stream=mx.cpu)

    @property
    def _measured(self) -> mx.array:
        """As ``measured``, of the sums."""
        if len(self._parts) == 1:
            return self._parts[0][1].measured
        return in_order([sums.measured for _, sums in self._parts], [i for numbers, _ in self._parts for i in numbers])

    def norm(self) -> tuple[mx.array, mx.array]:
        """The global norm of the average, float32, and whether it is finite, bool, shape () each."""
        if self._norm_type in (1, 2):
            return norm_of_sums(self._measured, self._placed, self._norm_type, self._after)
        self._wait()
        leaves = self._by_leaf(lambda sums, numbers: sums.leaves)
        norm, finite = norm_of(leaves, self._placed, self._norm_type, self.schedule.stream)
        return mx.multiply(norm, self._after, stream=mx.cpu), finite

    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> list[mx.array]:
        """The leaves of the average times a factor, float32, shape () or (leaves,); zeros where ``finite`` is given and
        False. Once only."""
        self._wait()
        with self.schedule.arithmetic():
            factor = factor * self._after
        self.schedule.wait([factor])

        def scaled(sums: Sums, numbers: list[int]) -> list[mx.array]:
            own = factor
            if factor.ndim > 0 and len(self._parts) > 1:
                with self.schedule.arithmetic():
                    own = mx.take(factor, mx.array(numbers, mx.int32))
            return sums.scaled(own, finite)

        return self._by_leaf(scaled)

    def _by_leaf(self, arrays_of: Callable[[Sums, list[int]], list[mx.array]]) -> list[mx.array]:
        """The arrays of all parts, in the order of the leaves."""
        by_number: dict[int, mx.array] = {}
        for numbers, sums in self._parts:
            by_number |= zip(numbers, arrays_of(sums, numbers), strict=True)
        return [by_number[i] for i in range(len(by_number))]

    def _wait(self) -> None:
        self.schedule.wait([x for _, sums in self._parts for x in sums.arriving])


def _parts_of_mean(arrays: list[mx.array], communication_dtype: mx.Dtype | None, n: int) -> tuple[float, float]:
    """What each rank's gradient, and the sum of all, are multiplied by for the mean."""
    # The sum of a few float16 gradients may not fit float16 where their mean does.
    sent = [x.dtype for x in arrays] + ([] if communication_dtype is None else [communication_dtype])
    return (1.0 / n, 1.0) if mx.float16 in sent else (1.0, 1.0 / n)


def check_weight(weight: float | mx.array | None) -> None:
    """Raise unless it is None, an array of one value, or a number that a rank may count by."""
    counts = None if weight is None else scalar("weight", weight)
    if counts is not None and not isinstance(counts, mx.array):
        check(0 <= counts < math.inf, "weight should be >= 0 and finite", weight)


def _weighted(
    arrays: list[mx.array], weight: float | mx.array, group: mx.distributed.Group, schedule: Schedule
) -> list[mx.array]:
    """The leaves times this rank's share of the weights of all ranks; zeros if that is 0. One tiny collective."""
    with schedule.arithmetic():
        mine = mx.array(scalar("weight", weight), mx.float32).reshape(())
    (total,) = schedule.bring([all_sum(mine, group)])
    with schedule.arithmetic():
        share, counts = mine / total, mine > 0
    return schedule.scale(arrays, share, counts)


def _groups(placed: Placed, group: mx.distributed.Group) -> list[tuple[mx.distributed.Group, list[int]]]:
    """The ranks over which leaves are added up, and the numbers of those leaves: the group, or with the axes over which
    leaves are partial besides.

    Raises:
        LayoutError: a leaf is called sharded, or partial, over ranks that it is averaged over.
    """
    if group.size() > 1:
        _check_averaged_are_replicas(placed, group)
    partial = {i for numbers in placed.summed.values() for i in numbers}
    others = [i for i in range(len(placed.placements)) if i not in partial]
    groups = [(group, others)] if others or not partial else []
    for placement, numbers in placed.summed.items():
        mesh = mesh_of(placement, group)
        averaged = mesh.axes_of(group)
        if averaged is None:
            raise LayoutError(
                f"Leaf '{placed.leaves.paths[numbers[0]]}' is called {placement}, but the gradient is averaged over a "
                f"group that is not one of {mesh}: pass group=mesh.group(...) of that mesh."
            )
        groups.append((mesh.group(*averaged, *placement.axes), numbers))
    return groups


def _check_averaged_are_replicas(placed: Placed, group: mx.distributed.Group) -> None:
    spans = [[a for a in axes if mesh.axes[a] > 1] for mesh in MESHES if (axes := mesh.axes_of(group)) is not None]
    for path, placement in zip(placed.leaves.paths, placed.placements, strict=True):
        if isinstance(placement, Replicated):
            continue
        over = next((axes for axes in spans if set(axes) & set(placement.axes) or not placement.axes), [])
        if over or not placement.axes:
            named = f"the {'axis' if len(over) == 1 else 'axes'} {', '.join(over)}" if over else "the group"
            raise LayoutError(
                f"Leaf '{path}' is called {placement}, but it is averaged over {named} and so is the same there. Name "
                "the other axes that shard it (group=mesh.group('dp'), Sharded('tp')), or over which it is partial, or "
                "use clip_grad_norm for leaves that are not averaged."
            )


def check_communication_dtype(dtype: mx.Dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)):
        raise TypeError(f"communication_dtype should be a floating dtype such as mx.bfloat16, not {dtype!r}")
