"""The sum of partial gradients over ranks: few collectives for many leaves, whatever their types.

Leaves of one type travel together in buckets. Where leaves and collectives share a stream of the CPU, the native kernel
packs a bucket, and measures and unpacks it into the gradients' own buffers when it arrives, while it is in the cache.
Elsewhere a bucket is a new array, which can travel while the backward pass makes the next.
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
from distclip.engine.order import in_order
from distclip.engine.streams import Stream, stream_of

BUCKET_BYTES = 4 * 2**20  # more than any network's latency is worth, and still in the cache when it arrives
HAND_OVERS = 32  # buckets of a step that are sent as they are made, since each hand-over to MLX costs


def sum_over_ranks(
    leaves: list[mx.array],
    *,
    group: mx.distributed.Group,
    before: float,
    measure: bool = True,
    norm_type: float = 2.0,
    communication_dtype: mx.Dtype | None,
    bucket_bytes: int,
    stream: Stream,
    communication: mx.Stream,
    order: list[int] | None = None,
) -> Sums:
    """Each leaf's sum over the ranks of a group, on its way.

    Args:
        leaves: floating or complex arrays, partial, of the same shapes and dtypes on every rank.
        before: what each rank multiplies its leaves by.
        measure: whether the sums will be measured.
        norm_type: of the norm for which they will be.
        communication_dtype, bucket_bytes, stream: as in :func:`distclip.average_gradients`.
        communication: where the collectives run, a stream of the CPU.
        order: the numbers of the leaves, in which they are sent at once, bucket by bucket as they are made, and
            measured when they arrive; the same on every rank. None: nothing is sent before the results are evaluated.
    """
    if group.size() == 1:
        return Buckets(leaves, [[i] for i in range(len(leaves))], list(leaves), norm_type, stream)
    native = kernels.native_kernel(stream)
    # The kernel measures a complex number as two real ones.
    measurable = norm_type == 2 or (norm_type == 1 and all(leaf.dtype != mx.complex64 for leaf in leaves))
    if native is not None and measurable and order is None:
        wire = communication_dtype
        return native.sum_over_ranks(leaves, group, norm_type == 1, before, wire, bucket_bytes, communication)
    buckets = list(_fill(leaves, bucket_bytes) if order is None else _fill_in_order(leaves, order, bucket_bytes))
    totals: list[mx.array] = []
    measured: list[mx.array] = []
    for bucket in buckets:
        packed = _packed([leaves[i] for i in bucket], before, communication_dtype, stream)
        totals.append(mx.distributed.all_sum(packed, group=group, stream=communication))
        if order is None:
            continue
        if measure and norm_type in (1, 2):  # while it is in the cache, and the others travel
            ends = _ends([leaves[i].size for i in bucket])
            parts = list(mx.split(totals[-1], ends, stream=communication)) if ends else totals[-1:]
            measured.append(kernels.sums_of(parts, norm_type, communication))
        mx.async_eval(totals[-1], *measured[-1:])
    return Buckets(leaves, buckets, totals, norm_type, stream, measured)


class Buckets:
    """The sums by MLX operations.

    Args:
        leaves: as they were before, for their shapes and dtypes.
        buckets: for each bucket the numbers of its leaves.
        totals: for each bucket its sum over the ranks: flat, or the leaf's shape if it holds one leaf.
        norm_type, stream: as in :func:`sum_over_ranks`.
        measured: for each bucket what was measured of its leaves' sums when it arrived, if it was.
    """

    def __init__(
        self,
        leaves: list[mx.array],
        buckets: list[list[int]],
        totals: list[mx.array],
        norm_type: float,
        stream: Stream,
        measured: list[mx.array] | None = None,
    ) -> None:
        self._kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
        self._buckets, self._norm_type, self._stream = buckets, norm_type, stream
        self._received, self._measured = totals, measured or []

    @property
    def arriving(self) -> list[mx.array]:
        """What comes from the network."""
        return self._received + self._measured

    @cached_property
    def _totals(self) -> list[mx.array]:
        """The sums in the type in which they travelled, or that of the leaves if it is wider: rounding comes last."""
        wide = []
        for bucket, total in zip(self._buckets, self._received, strict=True):
            dtype = self._kinds[bucket[0]][1]
            narrow = total.itemsize <= dtype.size
            wide.append(total.astype(dtype, stream=stream_of(total, self._stream)) if narrow else total)
        return wide

    @cached_property
    def leaves(self) -> list[mx.array]:
        """Each leaf's sum, in the type in which it travelled if that is wider than its own."""
        return self._split(self._totals)

    @property
    def measured(self) -> mx.array:
        """The sum of squares of each leaf's sum (of magnitudes for a 1-norm), and a count, as in kernels: float64,
        shape (leaves, 2)."""
        if self._measured:
            return in_order(self._measured, [i for bucket in self._buckets for i in bucket])
        return kernels.sums_of(self.leaves, self._norm_type, self._stream)

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
            ends = _ends([math.prod(self._kinds[i][0]) for i in bucket])
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


def _fill_in_order(leaves: list[mx.array], order: list[int], bucket_bytes: int) -> list[list[int]]:
    """Buckets of leaves in an order, at most HAND_OVERS of them unless each leaf travels alone."""
    most = HAND_OVERS - len({leaf.dtype for leaf in leaves})
    if bucket_bytes > 0:
        bucket_bytes = max(bucket_bytes, math.ceil(sum(leaf.nbytes for leaf in leaves) / most))
    return [[order[i] for i in bucket] for bucket in _fill([leaves[i] for i in order], bucket_bytes)]


def _ends(sizes: list[int]) -> list[int]:
    """Where each part of a bucket but the last ends."""
    return list(accumulate(sizes[:-1]))


def _packed(leaves: list[mx.array], before: float, communication_dtype: mx.Dtype | None, stream: Stream) -> mx.array:
    """Leaves of one dtype as they are sent: flat, by index; or as it is, if it is one leaf."""
    dtype, on = leaves[0].dtype, stream_of(leaves[0], stream)
    if len(leaves) > 1:
        bucket = mx.concatenate([mx.reshape(leaf, (-1,), stream=on) for leaf in leaves], stream=on)
    else:
        bucket = mx.contiguous(leaves[0], stream=on)
    if before != 1:
        bucket = mx.multiply(bucket, mx.array(before, mx.float32), stream=on).astype(dtype, stream=on)
    if communication_dtype is not None and mx.issubdtype(dtype, mx.floating):
        bucket = bucket.astype(communication_dtype, stream=on)
    return bucket
