"""The sum of partial gradients over ranks: few collectives for many leaves, whatever their types.

Leaves of one type travel together in buckets. The native kernel packs a bucket, and measures and unpacks it into the
gradients' own buffers when it arrives, while it is in the cache; with MLX operations a bucket is a new array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.native import Arriving
from distclip.engine.operations import Stream, stream_of


def sum_over_ranks(
    leaves: list[mx.array],
    group: mx.distributed.Group,
    before: float,
    norm_type: float,
    communication_dtype: mx.Dtype | None,
    bucket_bytes: int,
    stream: Stream,
) -> Arriving | Buckets:
    """Each leaf's sum over the ranks of a group, on its way.

    Args:
        leaves: floating or complex arrays, partial, of the same shapes and dtypes on every rank.
        before: what each rank multiplies its leaves by.
        norm_type: of the norm for which the sums will be measured.
        communication_dtype, bucket_bytes, stream: as in :func:`distclip.average_gradients`.
    """
    native = kernels.native(stream)
    whole = norm_type == 2 or (norm_type == 1 and all(leaf.dtype != mx.complex64 for leaf in leaves))
    if native is None or not whole or group.size() == 1:
        return Buckets(leaves, group, before, norm_type, communication_dtype, bucket_bytes, stream)
    return native.sum_over_ranks(leaves, group, norm_type == 1, before, communication_dtype, bucket_bytes, stream)


class Buckets:
    """The sums by MLX operations. On one rank they are the leaves themselves.

    Attributes:
        totals: arrays that make up the sums, each of one leaf or of several.
    """

    def __init__(
        self,
        leaves: list[mx.array],
        group: mx.distributed.Group,
        before: float,
        norm_type: float,
        communication_dtype: mx.Dtype | None,
        bucket_bytes: int,
        stream: Stream,
    ) -> None:
        self._leaves = leaves
        self._norm_type = norm_type
        self._stream = stream
        if group.size() == 1:
            self._indices = [[i] for i in range(len(leaves))]
            self.totals = list(leaves)
            return
        self._indices = list(_fill(leaves, bucket_bytes))
        self.totals = [
            _sum([leaves[i] for i in bucket], group, before, communication_dtype, stream) for bucket in self._indices
        ]

    @property
    def measured(self) -> mx.array:
        """The sum of squares of all sums (of magnitudes for a 1-norm), and a count, as in kernels: float64, (2,)."""
        return (kernels.sum_squares if self._norm_type == 2 else kernels.sum_abs)(self.totals, self._stream)

    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> list[mx.array]:
        """Each leaf's sum times a float32 scalar, in the leaf's type; zeros where ``finite`` is given and False."""
        results = list(self._leaves)
        for bucket, total in zip(self._indices, kernels.scale(self.totals, factor, finite, self._stream), strict=True):
            self._split(total, bucket, results)
        return results

    def _split(self, total: mx.array, bucket: list[int], results: list[mx.array]) -> None:
        """Put the parts of a bucket in the places of its leaves."""
        on = stream_of(total, self._stream)
        total = total.astype(self._leaves[bucket[0]].dtype, stream=on)
        if len(bucket) == 1:
            results[bucket[0]] = total
            return
        ends = list(accumulate(self._leaves[i].size for i in bucket[:-1]))
        for i, part in zip(bucket, mx.split(total, ends, stream=on), strict=True):
            results[i] = mx.reshape(part, self._leaves[i].shape, stream=on)


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
