"""Accurate sums over leaves on the CPU, by MLX operations.

A plain ``x.square().sum()`` is a single running float32 sum on the CPU (9 % low at 64 M values) and writes a temporary
array as large as the leaf. Here leaves are cut into blocks that stay in the cache, at most 32 of their values at a time
are added in float32, and everything beyond that is added in float64. Leaves of one shape share graph nodes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache

import mlx.core as mx

from distclip.engine.order import in_order
from distclip.engine.streams import Stream, stream_of, working_on

BLOCK = 1 << 18  # values in a block: 1 MB of float32
LEAST_BLOCK = 1 << 16  # smaller blocks cost more to schedule than to add
SMALL = 1 << 14  # leaves up to this size are joined: a copy is cheaper than graph nodes for each
TINY = 1 << 10  # leaves up to this size are joined and summed in float64
TERMS = 32  # float32 additions before float64 takes over: a relative error of at most 32 * 2**-24

Map = Callable[[mx.array, Stream], mx.array]


def sums(leaves: list[mx.array], function: Map, real: Map, stream: Stream) -> mx.array:
    """The sum of a function's values over each leaf: float64, shape (leaves,).

    Args:
        leaves: of any shapes and dtypes.
        function: of a real array, value by value.
        real: makes real leaves of complex ones.
    """

    def measure(alike: list[mx.array], stream: Stream) -> mx.array:
        if alike[0].dtype == mx.complex64:
            alike = [real(leaf, stream) for leaf in alike]
        on = stream_of(alike[0], stream)
        if alike[0].size <= TINY:
            values = function(_joined(alike, on).astype(mx.float64, stream=mx.cpu), mx.cpu)
        else:
            values = _joined(list(_way_to_sum(alike[0].shape)(alike, function, on)), on).astype(
                mx.float64, stream=mx.cpu
            )
        rows = mx.reshape(values, (len(alike), values.size // len(alike)), stream=mx.cpu)
        return mx.sum(rows, axis=1, stream=mx.cpu)

    return _by_shape(leaves, measure, stream)


def largest(leaves: list[mx.array], stream: Stream) -> mx.array:
    """The largest magnitude of each leaf, NaN if any value is: float64, shape (leaves,)."""
    return _by_shape(leaves, _largest, stream)


def _by_shape(
    leaves: list[mx.array], measure: Callable[[list[mx.array], Stream], mx.array], stream: Stream
) -> mx.array:
    """What ``measure`` makes of the leaves of each shape and dtype, in the order of the leaves: float64, (leaves,)."""
    alike: dict[tuple[tuple[int, ...], mx.Dtype], list[int]] = defaultdict(list)
    for i, leaf in enumerate(leaves):
        alike[leaf.shape, leaf.dtype].append(i)
    measured = [measure([leaves[i] for i in indices], stream) for indices in alike.values()]
    none = mx.zeros((0,), mx.float64, stream=mx.cpu)
    return in_order([none, *measured], [i for indices in alike.values() for i in indices])


@cache
def _way_to_sum(shape: tuple[int, ...]) -> Callable[[list[mx.array], Map, Stream], Iterator[mx.array]]:
    size = math.prod(shape)
    if size <= SMALL:
        return _sums_of_small
    one_block = size <= BLOCK and _terms(size, TERMS) > TERMS // 2
    return _sums_of_vectors if len(shape) == 1 and one_block else _sums_of_large


def _joined(leaves: list[mx.array], stream: Stream) -> mx.array:
    if len(leaves) == 1:
        return leaves[0]
    return (mx.concatenate if leaves[0].ndim > 0 else mx.stack)(leaves, stream=stream)


def _widened(x: mx.array, stream: Stream) -> mx.array:
    return x if x.dtype in (mx.float32, mx.float64) else x.astype(mx.float32, stream=stream)


def _largest(leaves: list[mx.array], stream: Stream) -> mx.array:
    """The largest magnitudes of leaves of one shape and dtype: float64, (leaves,)."""
    on = stream_of(leaves[0], stream)
    if leaves[0].size == 0:
        return mx.zeros((len(leaves),), mx.float64, stream=mx.cpu)

    def magnitudes(x: mx.array) -> mx.array:
        # The magnitude of the least integer does not fit its type.
        wide = x if mx.issubdtype(x.dtype, mx.inexact) else x.astype(mx.float32, stream=on)
        return mx.abs(wide, stream=on)

    if leaves[0].size <= SMALL:
        rows = mx.reshape(magnitudes(_joined(leaves, on)), (len(leaves), -1), stream=on)
        largest = mx.max(rows, axis=1, stream=on)
    else:
        largest = mx.stack([mx.max(magnitudes(leaf), stream=on) for leaf in leaves], stream=on)
    return largest.astype(mx.float64, stream=mx.cpu)


# Each yields arrays whose values, each made of at most TERMS float32 additions, add up to the function's sums, leaf by
# leaf. Blocks come one after the other: left alone, MLX works out the function of many blocks before it adds any.


def _sums_of_small(leaves: list[mx.array], function: Map, stream: Stream) -> Iterator[mx.array]:
    size = leaves[0].size
    count, terms = BLOCK // size, _terms(size, TERMS)
    last: mx.array | None = None
    for begin in range(0, len(leaves), count):
        batch = leaves[begin : begin + count]
        if last is not None:
            batch = mx.depends(batch, last)
        values = function(_widened(_joined(batch, stream), stream), stream)
        rows = mx.reshape(values, (len(batch), terms, size // terms), stream=stream)
        last = mx.sum(rows, axis=1, stream=stream)
        yield last


def _sums_of_vectors(leaves: list[mx.array], function: Map, stream: Stream) -> Iterator[mx.array]:
    """As :func:`_sums_of_large`, of leaves of one block that need not be cut: with the fewest calls for each."""
    groups = _terms(leaves[0].size, TERMS), -1
    last: mx.array | None = None
    with working_on(stream):
        for leaf in leaves:
            if last is not None:
                leaf = mx.depends(leaf, last)
            last = function(_widened(leaf, stream), stream).reshape(groups).sum(0)
            yield last


def _sums_of_large(leaves: list[mx.array], function: Map, stream: Stream) -> Iterator[mx.array]:
    last: mx.array | None = None
    for leaf in leaves:
        sums: list[mx.array] = []
        for blocks, cut in _blocks(leaf, stream):
            total: mx.array | None = None
            for block in blocks:
                if last is not None and block.size > SMALL:
                    block = mx.depends(block, last)
                values = function(_widened(block, stream), stream)
                last = total = values if total is None else mx.add(total, values, stream=stream)
            assert total is not None
            last = _add_neighbours(total, TERMS // len(blocks), cut, stream)
            sums.append(last)
        yield sums[0] if len(sums) == 1 else _joined([mx.reshape(x, (-1,), stream=stream) for x in sums], stream)


def _add_neighbours(values: mx.array, most: int, cut: bool, stream: Stream) -> mx.array:
    """The sums of groups of at most ``most`` values, along the axis across which the leaf is, or would be, cut."""
    if values.ndim == 2 and cut:
        values = mx.transpose(values, stream=stream)
    if min(values.shape) < TERMS:
        values = mx.reshape(values, (-1,), stream=stream)
    terms = _terms(values.shape[0], most)
    if terms == 1:
        return values
    groups = (terms, -1) if values.ndim == 1 else (-1, terms)  # in both the values to add are runs of memory
    return mx.sum(mx.unflatten(values, 0, groups, stream=stream), axis=values.ndim - 1, stream=stream)


@cache
def _terms(length: int, most: int) -> int:
    """The largest number up to ``most`` that divides a length."""
    return next(n for n in range(most, 0, -1) if length % n == 0)


def _blocks(leaf: mx.array, stream: Stream) -> Iterator[tuple[list[mx.array], bool]]:
    """Cut a leaf into vectors and matrices of about BLOCK values: blocks of one shape, at most TERMS at a time, and
    whether they were cut.

    The gradient of a linear layer arrives transposed in memory, and an operation cannot see which it is. So a matrix
    is cut across its longer axis, and lies with that axis last: runs of memory stay long in both orders.
    """
    if leaf.ndim > 2 and leaf.size // leaf.shape[0] >= LEAST_BLOCK:
        slices = [mx.squeeze(x, 0, stream=stream) for x in mx.split(leaf, leaf.shape[0], axis=0, stream=stream)]
        if slices[0].ndim == 2 and slices[0].size <= BLOCK:
            yield from ((slices[i : i + TERMS], False) for i in range(0, len(slices), TERMS))
        else:
            for x in slices:
                yield from _blocks(x, stream)
        return
    count = math.ceil(leaf.size / BLOCK)
    if leaf.ndim > 2 or (count == 1 and min(leaf.shape) < TERMS):
        leaf = mx.reshape(leaf, (-1,), stream=stream)
    if count == 1:
        yield from (([block], False) for block in _without_rest(leaf, 0, stream))
        return
    if leaf.ndim == 2 and leaf.shape[0] >= leaf.shape[1]:
        leaf = mx.transpose(leaf, stream=stream)
    most, length = leaf.size // LEAST_BLOCK, leaf.shape[-1]
    # TERMS blocks, or as many as divide TERMS: the blocks are added, and then neighbours for the terms that are left.
    parts = math.ceil(count / TERMS) * TERMS if most >= TERMS else 1 << (most.bit_length() - 1)
    multiple = TERMS // min(parts, TERMS)
    step = math.ceil(length / parts / multiple) * multiple
    blocks = list(mx.split(leaf, list(range(step, length, step)), axis=-1, stream=stream))
    rest = [blocks.pop()] if length % step else []
    yield from ((blocks[i : i + TERMS], True) for i in range(0, len(blocks), TERMS))
    yield from (([block], True) for last in rest for block in _without_rest(last, -1, stream))


def _without_rest(block: mx.array, axis: int, stream: Stream) -> list[mx.array]:
    """A block whose length can be divided by a number near TERMS, and if need be what is left over."""
    length = block.shape[axis]
    if length <= TERMS or _terms(length, TERMS) > TERMS // 2:
        return [block]
    return list(mx.split(block, [length - length % TERMS], axis=axis, stream=stream))
