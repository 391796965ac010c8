"""Sums over leaves on a device, by MLX operations that are fused: never more launches or bytes than MLX's own
``clip_grad_norm``, and added in float32 whatever the leaf's type.

A leaf is cut into up to eight parts, all of which a single launch reads; it writes the sum of their squares, an array
of an eighth of the values, which a reduction adds up. What the leaves gave crosses to the CPU together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx

from distclip.engine.order import in_order
from distclip.engine.streams import Stream, to_device, working_on

JOINED = 1 << 10  # leaves up to this size are joined, and summed on the CPU: launches for each cost more
PARTS = (8, 7, 6, 5, 4, 3, 2, 11, 13)  # into how many parts a leaf is cut, the best first

Function = Callable[..., mx.array]  # of an array, a stream and more arrays, value by value


def sums(leaves: list[mx.array], function: Function, stream: Stream, *more: mx.array) -> mx.array:
    """The sum of a function's values over each leaf: float64, shape (leaves,).

    Args:
        leaves: of any shapes and dtypes but float64.
        function: float32 from the values of a leaf as float32 or complex64; the same object at each call.
        stream: of a device; the last additions are on the CPU.
        more: float64, shape (), on the CPU: what else the function needs.
    """
    return _reduced(leaves, _Reduction(function, mx.add, mx.sum), stream, more)


def largest(leaves: list[mx.array], function: Function, stream: Stream) -> mx.array:
    """The largest of a function's values of each leaf, NaN if any is, 0 of none: float64, shape (leaves,)."""
    return _reduced(leaves, _Reduction(function, mx.maximum, mx.max), stream, ())


class _Reduction(NamedTuple):
    function: Function
    combine: Callable[..., mx.array]
    reduce: Callable[..., mx.array]


def _reduced(leaves: list[mx.array], reduction: _Reduction, stream: Stream, more: tuple[mx.array, ...]) -> mx.array:
    small: dict[mx.Dtype, list[int]] = defaultdict(list)
    large: list[int] = []
    order: list[int] = []  # the empty leaves first
    for i, leaf in enumerate(leaves):
        (order if leaf.size == 0 else small[leaf.dtype] if _is_small(leaf) else large).append(i)
    values = [mx.zeros((len(order),), mx.float64, stream=mx.cpu)]
    for indices in small.values():
        indices.sort(key=lambda i: leaves[i].size)
        values += _of_small([leaves[i] for i in indices], reduction, stream, more)
        order += indices
    if large:
        values.append(_of_large([leaves[i] for i in large], reduction, stream, more))
        order += large
    return in_order(values, order)


def _is_small(leaf: mx.array) -> bool:
    return leaf.size <= JOINED or (leaf.size <= 4 * JOINED and _cut(leaf.shape)[0] == 1)


def _cut(shape: tuple[int, ...], most: int = max(PARTS)) -> tuple[int, int]:
    """Into how many equal parts a leaf is cut, and along which axis."""
    counts = [parts for parts in PARTS if parts <= most]
    return next(((n, axis) for n in counts for axis, length in enumerate(shape) if length % n == 0), (1, 0))


def _of_small(
    leaves: list[mx.array], reduction: _Reduction, stream: Stream, more: tuple[mx.array, ...]
) -> list[mx.array]:
    """For leaves of one dtype, by rising size: what those of each size give, float64."""
    with working_on(stream):
        flat = [mx.reshape(leaf, (-1,)) for leaf in leaves]
        joined = mx.concatenate(flat) if len(flat) > 1 else flat[0]
    sizes = Counter(leaf.size for leaf in leaves)
    ends = list(accumulate(size * count for size, count in sizes.items()))
    with mx.stream(mx.cpu):
        wide = joined if joined.dtype == mx.complex64 else joined.astype(mx.float64)
        values = mx.split(reduction.function(wide, None, *more).astype(mx.float64), ends[:-1])
        rows = [mx.reshape(part, (count, size)) for part, (size, count) in zip(values, sizes.items(), strict=True)]
        return [reduction.reduce(part, axis=1) for part in rows]


def _of_large(leaves: list[mx.array], reduction: _Reduction, stream: Stream, more: tuple[mx.array, ...]) -> mx.array:
    """What each leaf gives, float64: one array from the device to the CPU."""
    there = to_device([x.astype(mx.float32, stream=mx.cpu) for x in more], stream) if more else []
    with working_on(stream):
        values = []
        for leaf in leaves:
            parts, axis = _cut(leaf.shape, 2 if more else max(PARTS))  # MLX fuses at most eleven operations in a row
            cut = mx.split(leaf, parts, axis=axis) if parts > 1 else [leaf]
            values.append(reduction.reduce(_fused(reduction, parts)(*cut, *there)))
        together = mx.stack(values) if len(values) > 1 else mx.reshape(values[0], (1,))
    return together.astype(mx.float64, stream=mx.cpu)


@cache
def _fused(reduction: _Reduction, parts: int) -> Any:
    """The function's values of a leaf's parts, added up: one launch."""

    def combined(*arrays: mx.array) -> mx.array:
        more = arrays[parts:]
        values = [reduction.function(_widened(x), None, *more) for x in arrays[:parts]]
        while len(values) > 1:
            pairs = [reduction.combine(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
            values = pairs + values[len(pairs) * 2 :]
        return values[0]

    return mx.compile(combined, shapeless=True)


def _widened(x: mx.array) -> mx.array:
    return x if x.dtype in (mx.float32, mx.complex64) else x.astype(mx.float32)
