"""Data parallel training: from each rank's partial gradients to their average, and to the clipped average."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

from distclip import kernels
from distclip.check import check_same_tree, describe
from distclip.clip import check_max_norm, check_policy, raise_if_bad, scale_of
from distclip.layout import (
    Layout,
    LayoutError,
    Placement,
    Replicated,
    Sharded,
    communicates,
    flatten,
    placements,
    rebuild,
)
from distclip.norm import norm_of, weigh
from distclip.operations import Stream, stream_of
from distclip.world import init

BUCKET_BYTES = 32 * 2**20


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
        bucket_bytes (int): leaves of one dtype are sent together until they reach this size. 0: each leaf alone.
            Default: 32 MiB.
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
    paths, leaves = _floating(grads, stream)
    n = group.size()
    if n == 1:
        return rebuild(grads, leaves)
    _check_once(paths, leaves, group)
    early = _divides_early(leaves, communication_dtype)
    averaged = list(leaves)
    for bucket in _buckets(leaves, bucket_bytes, range(len(leaves))):
        total = _sum_over_ranks([leaves[i] for i in bucket], group, communication_dtype, early, stream)
        mean = total if early else mx.divide(total, n, stream=stream_of(total, stream))
        _split(mean, bucket, averaged, stream)
    return rebuild(grads, averaged)


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
    paths, leaves = _floating(grads, stream)
    placed = placements(grads, layout)
    n = group.size()
    if n > 1:
        _check_averaged_are_replicas(paths, placed, group)
        _check_once(paths, leaves, group)
    early = n == 1 or _divides_early(leaves, communication_dtype)
    agreed = world.group if world.size > 1 and communicates(layout, placed) else None

    buckets, totals, kinds = [], [], []
    for placement, indices in _by_placement(placed).items():
        for bucket in _buckets(leaves, bucket_bytes if n > 1 else 0, indices):
            buckets.append(bucket)
            totals.append(_sum_over_ranks([leaves[i] for i in bucket], group, communication_dtype, early, stream))
            kinds.append(placement)

    weighted = weigh(totals, kinds, agreed) if agreed is not None else [(1.0, totals)]
    norm, finite = norm_of(weighted, agreed, norm_type, stream)
    norm = norm if early else norm / n
    if nonfinite == "raise":
        raise_if_bad(grads, agreed or (group if n > 1 else None), norm, finite, norm_type)
    factor = scale_of(norm, max_norm)
    scaled = kernels.scale(totals, factor if early else factor / n, finite if nonfinite == "zero" else None, stream)
    results = list(leaves)
    for bucket, array in zip(buckets, scaled, strict=True):
        _split(array, bucket, results, stream)
    return rebuild(grads, results), norm


def _floating(grads: Any, stream: Stream) -> tuple[list[str], list[mx.array]]:
    """The paths and the leaves; integers as float32, since a sum may not fit their type and a mean is no integer."""
    flat = flatten(grads)
    leaves = [
        leaf if mx.issubdtype(leaf.dtype, mx.inexact) else leaf.astype(mx.float32, stream=stream) for _, leaf in flat
    ]
    return [path for path, _ in flat], leaves


def _sum_over_ranks(
    leaves: list[mx.array],
    group: mx.distributed.Group,
    communication_dtype: mx.Dtype | None,
    early: bool,
    stream: Stream,
) -> mx.array:
    """One all-reduce for leaves of one dtype: their sum (their mean if ``early``), flat, or the leaf if it is one."""
    if group.size() == 1:
        return leaves[0]
    dtype, on = leaves[0].dtype, stream_of(leaves[0], stream)
    bucket = leaves[0]
    if len(leaves) > 1:
        bucket = mx.concatenate([mx.reshape(leaf, (-1,), stream=on) for leaf in leaves], stream=on)
    if early:
        bucket = mx.divide(bucket, group.size(), stream=on).astype(dtype, stream=on)
    if communication_dtype is not None and mx.issubdtype(dtype, mx.floating):
        bucket = bucket.astype(communication_dtype, stream=on)
    total = mx.distributed.all_sum(bucket, group=group)
    # A wider type stays until the sum is divided and scaled: rounding comes last.
    return total.astype(dtype, stream=on) if total.itemsize <= dtype.size else total


def _divides_early(leaves: list[mx.array], communication_dtype: mx.Dtype | None) -> bool:
    # The sum of a few float16 gradients may not fit float16 where their mean does.
    sent = [leaf.dtype for leaf in leaves] + ([] if communication_dtype is None else [communication_dtype])
    return mx.float16 in sent


def _buckets(leaves: list[mx.array], bucket_bytes: int, indices: Iterable[int]) -> Iterator[list[int]]:
    """Leaves by dtype, in the tree's order, in buckets that close when they reach ``bucket_bytes``."""
    open_buckets: dict[mx.Dtype, list[int]] = defaultdict(list)
    filled: dict[mx.Dtype, int] = defaultdict(int)
    for i in indices:
        dtype = leaves[i].dtype
        open_buckets[dtype].append(i)
        filled[dtype] += leaves[i].nbytes
        if filled[dtype] >= bucket_bytes:
            yield open_buckets.pop(dtype)
            filled[dtype] = 0
    yield from open_buckets.values()


def _by_placement(placed: list[Placement]) -> dict[Placement, list[int]]:
    found: dict[Placement, list[int]] = defaultdict(list)
    for i, placement in enumerate(placed):
        found[placement].append(i)
    return found


def _split(array: mx.array, bucket: list[int], leaves: list[mx.array], stream: Stream) -> None:
    """Put the parts of a bucket in the places of its leaves."""
    on = stream_of(array, stream)
    array = array.astype(leaves[bucket[0]].dtype, stream=on)
    if len(bucket) == 1:
        leaves[bucket[0]] = array
        return
    ends = list(accumulate(leaves[i].size for i in bucket[:-1]))
    for i, part in zip(bucket, mx.split(array, ends, stream=on), strict=True):
        leaves[i] = mx.reshape(part, leaves[i].shape, stream=on)


def _check_averaged_are_replicas(paths: list[str], placed: list[Placement], group: mx.distributed.Group) -> None:
    over = next((mesh.larger_than_1(axes) for mesh in init().meshes if (axes := mesh.axes_of(group)) is not None), ())
    for path, placement in zip(paths, placed, strict=True):
        if isinstance(placement, Sharded) and (not placement.axes or set(placement.axes) & set(over)):
            named = f"the {'axis' if len(over) == 1 else 'axes'} {', '.join(over)}" if over else "the group"
            raise LayoutError(
                f"Leaf '{path}' is called {placement}, but it is averaged over {named} and so is the same there. Name "
                "the other axes that shard it (group=mesh.group('dp'), Sharded('tp')), or use clip_grad_norm for "
                "leaves that are not averaged."
            )


def _check_communication_dtype(dtype: mx.Dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, mx.Dtype) and mx.issubdtype(dtype, mx.floating)):
        raise TypeError(f"communication_dtype should be a floating dtype such as mx.bfloat16, not {dtype!r}")


def _check_once(paths: list[str], leaves: list[mx.array], group: mx.distributed.Group) -> None:
    _checked(tuple((path, leaf.shape, leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)), group)


@lru_cache(maxsize=128)
def _checked(tree: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...], group: mx.distributed.Group) -> None:
    check_same_tree([f"{path}: {describe(dtype, shape)}" for path, shape, dtype in tree], group)
