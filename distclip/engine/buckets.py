"""The sum of partial gradients over ranks: few collectives for many leaves, whatever their types.

Leaves of one type travel together in buckets. The native kernel packs a bucket, and measures and unpacks it into the
gradients' own buffers when it arrives, while it is in the cache; with MLX operations a bucket is a new array.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.native import Sums
from distclip.engine.streams import Stream, stream_of


def sum_over_ranks(
    leaves: list[mx.array],
    *,
    group: mx.distributed.Group,
    before: float,
    norm_type: float,
    communication_dtype: mx.Dtype | None,
    bucket_bytes: int,
    stream: Stream,
) -> Sums:
    """Each leaf's sum over the ranks of a group, on its way.

    Args:
        leaves: floating or complex arrays, partial, of the same shapes and dtypes on every rank.
        before: what each rank multiplies its leaves by.
        norm_type: of the norm for which the sums will be measured.
        communication_dtype, bucket_bytes, stream: as in :func:`distclip.average_gradients`.
    """
    native = kernels.native_kernel(stream)
    # The kernel measures a complex number as two real ones.
    measurable = norm_type == 2 or (norm_type == 1 and all(leaf.dtype != mx.complex64 for leaf in leaves))
    if native is not None and measurable and group.size() > 1:
        return native.sum_over_ranks(leaves, group, norm_type == 1, before, communication_dtype, bucket_bytes, stream)
    if group.size() == 1:
        buckets, totals = [[i] for i in range(len(leaves))], list(leaves)
    else:
        buckets = list(_fill(leaves, bucket_bytes))
        totals = [_sum([leaves[i] for i in bucket], group, before, communication_dtype, stream) for bucket in buckets]
    return Buckets(leaves, buckets, totals, norm_type, stream)


class Buckets:
    """The sums by MLX operations.

    Args:
        leaves: as they were before, for their shapes and dtypes.
        buckets: for each bucket the numbers of its leaves.
        totals: for each bucket its sum over the ranks: flat, or the leaf's shape if it holds one leaf.
        norm_type, stream: as in :func:`sum_over_ranks`.
    """

    def __init__(
        self, leaves: list[mx.array], buckets: list[list[int]], totals: list[mx.array], norm_type: float, stream: Stream
    ) -> None:
        self._kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
        self._buckets, self._totals, self._norm_type, self._stream = buckets, totals, norm_type, stream

    @cached_property
    def leaves(self) -> list[mx.array]:
        """Each leaf's sum, in the type in which it travelled if that is wider than its own."""
        return self._split(self._totals)

    @property
    def measured(self) -> mx.array:
        """The sum of squares of each leaf's sum (of magnitudes for a 1-norm), and a count, as in kernels: float64,
        shape (leaves, 2)."""
        return (kernels.sum_squares if self._norm_type == 2 else kernels.sum_abs)(self.leaves, self._stream)

    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> list[mx.array]:
        """Each leaf's sum times a factor as in :func:`distclip.engine.kernels.scale`, in the leaf's type; zeros where
        ``finite`` is given and False."""
        if factor.ndim > 0:
            return self._narrow(kernels.scale(self.leaves, factor, finite, self._stream), range(len(self._kinds)))
        totals = kernels.scale(self._totals, factor, finite, self._stream)
        return self._split(self._narrow(totals, [bucket[0] for bucket in self._buckets]))

    def _narrow(self, sums: list[mx.array], indices: Iterable[int]) -> list[mx.array]:
        """Each sum in the type of the leaf of that number."""
        return [
            x.astype(self._kinds[i][1], stream=stream_of(x, self._stream)) for x, i in zip(sums, indices, strict=True)
        ]

    def _split(self, totals: list[mx.array]) -> list[mx.array]:
        """The parts of all buckets, in the order of the leaves."""
        parts: dict[int, mx.array] = {}
        for bucket, total in zip(self._buckets, totals, strict=True):
            on = stream_of(total, self._stream)
            ends = list(accumulate(math.prod(self._kinds[i][0]) for i in bucket[:-1]))
            split = mx.split(total, ends, stream=on) if ends else [total]
            parts |= {i: mx.reshape(part, self._kinds[i][0], stream=on) for i, part in zip(bucket, split, strict=True)}
        return [parts[i] for i in range(len(self._kinds))]


def _fill(leaves: list[mx.array], bucket_bytes: int) -> Iterator[list[int]]:
    """Leaves by dtype, in buckets that close when they reach ``bucket_bytes``; larger leaves alone."""
    open_buckets: dict[mx.Dtype, list[int]] = defaultdict(list)
    filled: dict[mx.Dtype, int] = defaultdict(int)
    for i, leaf in enumerate(leaves):
        if leaf.nbytes >= bucket_bytes:
            yield [i]
            continue
        open_buckets[leaf.dtype].append(i)
        filled[leaf.dtype] += leaf.nbytes
        if filled[leaf.dtype] >= bucket_bytes:
            yield open_buckets.pop(leaf.dtype)
            filled[leaf.dtype] = 0
    yield from open_buckets.values()


def _sum(
    leaves: list[mx.array],
    group: mx.distributed.Group,
    before: float,
    communication_dtype: mx.Dtype | None,
    stream: Stream,
) -> mx.array:
    """One all-reduce for leaves of one dtype: their sum, flat, or the leaf's if it is one."""
    dtype, on = leaves[0].dtype, stream_of(leaves[0], stream)
    bucket = leaves[0]
    if len(leaves) > 1:
        bucket = mx.concatenate([mx.reshape(leaf, (-1,), stream=on) for leaf in leaves], stream=on)
    if before != 1:
        bucket = mx.multiply(bucket, mx.array(before, mx.float32), stream=on).astype(dtype, stream=on)
    if communication_dtype is not None and mx.issubdtype(dtype, mx.floating):
        bucket = bucket.astype(communication_dtype, stream=on)
    total = mx.distributed.all_sum(bucket, group=group)
    # A wider type stays until the sum is divided and scaled: rounding comes last.
    return total.astype(dtype, stream=on) if total.itemsize <= dtype.size else total
