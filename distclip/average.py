"""Data parallel training: from each rank's partial gradients to their average, and to the clipped average."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx

from distclip.check import check_same_tree, describe
from distclip.engine import kernels
from distclip.engine.buckets import Buckets, sum_over_ranks
from distclip.engine.operations import Stream
from distclip.layout import Layout, LayoutError, Placement, Replicated, Sharded, communicates, copies, placements
from distclip.mesh import MESHES
from distclip.norm import added, norm_of, norm_of_sums
from distclip.policy import check_max_norm, check_policy, raise_if_bad, scale_of
from distclip.tree import arrays, flatten, rebuild
from distclip.world import init

BUCKET_BYTES = 4 * 2**20  # more than any network's latency is worth, and still in the cache when it arrives


def average_gradients(
    grads: Any,
    group: mx.distributed.Group | None = None,
    *,
    communication_dtype: mx.Dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    stream: Stream = None,
) -> Any:
    """The mean of the ranks' gradients: each leaf is partial before and a replica after.

    The counterpart of ``mlx.nn.average_gradients``, which falls back to one all-reduce per leaf when a tree mixes
    types; here each dtype has its buckets. Lazy, and traceable by ``mx.compile``. The first call with a tree also
    compares the ranks' trees (one tiny all-gather).

    Args:
        grads: tree of arrays of any shapes and dtypes, partial, the same paths, shapes and dtypes on every rank;
            ``None`` leaves stay None.
        group (mlx.core.distributed.Group, optional): the ranks to average over. Default: the world.
        communication_dtype (mlx.core.Dtype, optional): send floating leaves in this type (bfloat16 halves the bytes
            of float32; float32 keeps the sum of bfloat16 leaves exact). Default: each leaf's own.
        bucket_bytes (int): leaves of one dtype are sent together until they reach this size, and larger ones alone.
            0: each leaf alone. Default: 4 MiB.
        stream (mlx.core.Stream, optional): where the arithmetic runs. Default: the default device.

    Returns:
        The averaged gradients in the same tree, floating types kept, integers as float32.

    Raises:
        LayoutError: the ranks hold different trees at the first call with a tree. Later calls with a tree that was
            compared do not compare again, so ranks must not come to differ.
        TypeError: ``communication_dtype`` is no floating dtype, or a leaf is no array.
    """
    _check_communication_dtype(communication_dtype)
    group = init().group if group is None else group
    if group.size() == 1:
        return rebuild(grads, _floating(grads, stream)[1])
    placed: list[Placement] = [Replicated()] * len(arrays(grads))
    average = Average(grads, placed, group, 2.0, communication_dtype, bucket_bytes, stream)
    return rebuild(grads, average.scaled(mx.array(1.0)))


def average_and_clip(
    grads: Any,
    max_norm: float | mx.array,
    *,
    group: mx.distributed.Group | None = None,
    layout: Layout = Replicated(),  # noqa: B008
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    communication_dtype: mx.Dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    stream: Stream = None,
) -> tuple[Any, mx.array]:
    """Average the ranks' gradients and clip the average by its global norm, in one go.

    Equals ``clip_grad_norm(average_gradients(grads), max_norm, layout=layout)``, but the norm is taken of the buckets
    as they arrive and the division by the number of ranks is part of the scale. Lazy, and traceable by ``mx.compile``
    except with ``nonfinite="raise"``. A replicated layout adds no collective to those of the buckets, a sharded one
    adds one.

    Args:
        grads: tree of arrays, partial over ``group``, the same paths, shapes and dtypes on every rank of it.
        max_norm (float or scalar array): the largest norm of the average allowed, the same on every rank.
        group (mlx.core.distributed.Group, optional): the ranks to average over. Default: the world.
        layout: the placement of the leaves once averaged: ``Replicated()`` for plain data parallel training,
            ``Sharded("tp")`` for leaves that are split over another mesh axis than the one averaged over.
        norm_type, nonfinite: as in :func:`distclip.clip_grad_norm`.
        communication_dtype, bucket_bytes, stream: as in :func:`average_gradients`.

    Returns:
        (tree, mlx.core.array): the clipped average in the same tree, and its norm before clipping, float32, shape ().

    Raises:
        LayoutError: the ranks hold different trees, or a leaf is called sharded over ranks it is averaged over.
        ValueError, FloatingPointError: as in :func:`distclip.clip_grad_norm`.
    """
    check_max_norm(max_norm)
    check_policy(nonfinite)
    _check_communication_dtype(communication_dtype)
    world = init()
    group = world.group if group is None else group
    placed = placements(grads, layout)
    agreed = world.group if world.size > 1 and communicates(layout, placed) else None
    average = Average(grads, placed, group, norm_type, communication_dtype, bucket_bytes, stream)
    norm, finite = average.norm(agreed)
    if nonfinite == "raise":
        raise_if_bad(grads, agreed or (group if group.size() > 1 else None), norm, finite, norm_type)
    scaled = average.scaled(scale_of(norm, max_norm), finite if nonfinite == "zero" else None)
    return rebuild(grads, scaled), norm


class Average:
    """The average of a tree over the ranks of a group, on its way: measured, and then scaled, without being formed.

    Args:
        placed: the placement of every leaf once averaged.
        grads, group, norm_type, communication_dtype, bucket_bytes, stream: as in :func:`average_and_clip`.
    """

    def __init__(
        self,
        grads: Any,
        placed: list[Placement],
        group: mx.distributed.Group,
        norm_type: float,
        communication_dtype: mx.Dtype | None,
        bucket_bytes: int,
        stream: Stream,
    ) -> None:
        paths, self._leaves = _floating(grads, stream)
        if group.size() > 1:
            _check_averaged_are_replicas(paths, placed, group)
            _check_once(paths, self._leaves, group, stream)
        before, self.after = _shares(self._leaves, communication_dtype, group.size())
        self._norm_type, self._stream = norm_type, stream
        self._batches = _by_placement(placed)
        self._arriving = [
            sum_over_ranks(
                [self._leaves[i] for i in batch], group, before, norm_type, communication_dtype, bucket_bytes, stream
            )
            for batch in self._batches.values()
        ]

    def norm(self, agreed: mx.distributed.Group | None) -> tuple[mx.array, mx.array]:
        """The norm of the average, float32, and whether it is finite, bool, shape () each.

        Args:
            agreed: the ranks over which it is agreed by one collective; None where the average is the same on all.
        """
        if self._norm_type in (1, 2):
            return norm_of_sums(self._measured(agreed), agreed, self._norm_type, self.after)
        weights = self._weights(agreed)
        totals = [(w, cast(Buckets, batch).totals) for w, batch in zip(weights, self._arriving, strict=True)]
        norm, finite = norm_of(totals, agreed, self._norm_type, self._stream)
        return norm * self.after, finite

    def sums(self, agreed: mx.distributed.Group | None) -> mx.array:
        """What this rank adds to the sum of powers of ``1 / after`` times the average, and the count of what is not
        finite: float64, shape (2,)."""
        return added(self._measured(agreed))

    def _measured(self, agreed: mx.distributed.Group | None) -> list[tuple[float, mx.array]]:
        return [(weight, batch.measured) for weight, batch in zip(self._weights(agreed), self._arriving, strict=True)]

    def _weights(self, agreed: mx.distributed.Group | None) -> list[float]:
        return [1.0 if agreed is None else 1.0 / copies(placement, agreed) for placement in self._batches]

    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> list[mx.array]:
        """The leaves of the average times a float32 scalar; zeros where ``finite`` is given and False. Once only."""
        results = list(self._leaves)
        for indices, batch in zip(self._batches.values(), self._arriving, strict=True):
            for i, leaf in zip(indices, batch.scaled(factor * self.after, finite), strict=True):
                results[i] = leaf
        return results


def _floating(grads: Any, stream: Stream) -> tuple[list[str], list[mx.array]]:
    """The paths and the leaves; integers as float32, since a sum may not fit their type and a mean is no integer."""
    flat = flatten(grads)
    leaves = [
        leaf if mx.issubdtype(leaf.dtype, mx.inexact) else leaf.astype(mx.float32, stream=stream) for _, leaf in flat
    ]
    return [path for path, _ in flat], leaves


def _shares(leaves: list[mx.array], communication_dtype: mx.Dtype | None, n: int) -> tuple[float, float]:
    """What each rank's gradient, and the sum of all, are multiplied by for the mean."""
    # The sum of a few float16 gradients may not fit float16 where their mean does.
    sent = [leaf.dtype for leaf in leaves] + ([] if communication_dtype is None else [communication_dtype])
    return (1.0 / n, 1.0) if mx.float16 in sent else (1.0, 1.0 / n)


def _by_placement(placed: list[Placement]) -> dict[Placement, list[int]]:
    found: dict[Placement, list[int]] = defaultdict(list)
    for i, placement in enumerate(placed):
        found[placement].append(i)
    return found


def _check_averaged_are_replicas(paths: list[str], placed: list[Placement], group: mx.distributed.Group) -> None:
    spans = [mesh.larger_than_1(axes) for mesh in MESHES if (axes := mesh.axes_of(group)) is not None]
    for path, placement in zip(paths, placed, strict=True):
        if not isinstance(placement, Sharded):
            continue
        over = next((axes for axes in spans if set(axes) & set(placement.axes) or not placement.axes), ())
        if over or not placement.axes:
            named = f"the {'axis' if len(over) == 1 else 'axes'} {', '.join(over)}" if over else "the group"
            raise LayoutError(
                f"Leaf '{path}' is called {placement}, but it is averaged over {named} and so is the same there. Name "
                "the other axes that shard it (group=mesh.group('dp'), Sharded('tp')), or use clip_grad_norm for "
                "leaves that are not averaged."
            )


def _check_communication_dtype(dtype: mx.Dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)):
        raise TypeError(f"communication_dtype should be a floating dtype such as mx.bfloat16, not {dtype!r}")


def _check_once(paths: list[str], leaves: list[mx.array], group: mx.distributed.Group, stream: Stream) -> None:
    tree = tuple((path, leaf.shape, leaf.dtype) for path, leaf in zip(paths, leaves, strict=True))
    _checked(tree, kernels.engine(stream), group)


@lru_cache(maxsize=128)
def _checked(tree: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...], engine: str, group: mx.distributed.Group) -> None:
    # The engines send different things, so ranks with different ones would add up what does not belong together.
    lines = [f"{path}: {describe(dtype, shape)}" for path, shape, dtype in tree]
    check_same_tree([f"(engine: {engine}, see DISTCLIP_ENGINE)", *lines], group)
