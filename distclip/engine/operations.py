"""The two passes over the gradients by MLX operations: on a GPU, and where the native kernel was not built.

A plain ``x.square().sum()`` is a single running float32 sum on the CPU (9 % low at 64 M
values) and writes a temporary array as large as the leaf. Here leaves are cut into pieces that stay in the cache, the
squares of at most 32 pieces are added in float32, and everything beyond that is added in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx

Stream = mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None

PIECE = 1 << 18  # values in a piece: 1 MB of float32
LEAST_PIECE = 1 << 16  # smaller pieces cost more to schedule than to add
TINY = 1 << 10  # leaves up to this size are joined and summed in float64: copies are cheaper than nodes for each
TERMS = 32  # float32 additions before float64 takes over: a relative error of at most 32 * 2**-24


def sum_squares(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|**2`` over all leaves, and how many of its partial sums are not finite: float64, shape (2,).

    Args:
        leaves: arrays of any shape and dtype, what this rank holds. float64 leaves are summed on the CPU.
        stream: where the float32 work is done; the last additions are always on the CPU.
    """
    return _total(_real_parts(leaves, stream), lambda x, on: mx.square(x, stream=on))


def sum_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` over all leaves, and how many of its partial sums are not finite: float64, shape (2,)."""
    return _total(_real_parts(leaves, stream, magnitudes=True), lambda x, on: mx.abs(x, stream=on))


def sum_powers(leaves: list[mx.array], p: float, largest: mx.array, stream: Stream = None) -> tuple[mx.array, mx.array]:
    """See :func:`distclip.engine.kernels.sum_powers`: unit and sum, for leaves whose largest magnitude is known."""
    cpu = mx.cpu
    usable = mx.logical_and(mx.isfinite(largest, stream=cpu), mx.greater(largest, 0.0, stream=cpu), stream=cpu)
    exponent = mx.ceil(mx.log2(mx.where(usable, largest, 1.0, stream=cpu), stream=cpu), stream=cpu)
    unit = mx.power(mx.array(2.0, mx.float64), exponent, stream=cpu)
    shrink = mx.reciprocal(unit, stream=cpu)

    def powered(x: mx.array, on: Stream) -> mx.array:
        shrunk = mx.multiply(mx.abs(x, stream=on), shrink.astype(x.dtype, stream=cpu), stream=on)
        return mx.power(shrunk, p, stream=on)

    total = mx.take(_total(_real_parts(leaves, stream, magnitudes=True), powered), 0, stream=cpu)
    finite = mx.isfinite(largest, stream=cpu)
    zero = mx.equal(largest, 0.0, stream=cpu)
    return mx.where(zero, largest, unit, stream=cpu), mx.where(finite, total, largest, stream=cpu)


def max_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The largest ``|x|`` (NaN if any value is), and how many leaves are not finite: float64, shape (2,)."""
    found = []
    for part, on in _real_parts(leaves, stream, magnitudes=True):
        # The magnitude of the least integer does not fit its type.
        wide = part if mx.issubdtype(part.dtype, mx.floating) else part.astype(mx.float32, stream=on)
        found.append(mx.max(mx.abs(wide, stream=on), stream=on))
    return _combined([value.astype(mx.float64, stream=mx.cpu) for value in found], mx.max)


def scale(leaves: list[mx.array], factor: mx.array, finite: mx.array | None, stream: Stream = None) -> list[mx.array]:
    """Every leaf times one float32 factor. Floating leaves keep their type; integers become float32, as in MLX."""
    return [_scaled(leaf, factor, finite, stream) for leaf in leaves]


def _scaled(leaf: mx.array, factor: mx.array, finite: mx.array | None, stream: Stream) -> mx.array:
    stream = stream_of(leaf, stream)
    product = mx.multiply(leaf, factor, stream=stream)
    # Cast after the product, in which a small factor does not underflow.
    scaled = product.astype(leaf.dtype, stream=stream) if mx.issubdtype(leaf.dtype, mx.inexact) else product
    return (
        scaled if finite is None else mx.where(finite, scaled, mx.zeros((), scaled.dtype, stream=stream), stream=stream)
    )


def stream_of(leaf: mx.array, stream: Stream) -> Stream:
    """Where to work on a leaf: on the stream asked for, but float64 only exists on the CPU."""
    return mx.cpu if leaf.dtype == mx.float64 else stream


# ------------------------------------------------------------------------------------------ accurate sums

_Map = Callable[[mx.array, Stream], mx.array]


def _total(parts: Iterable[_Part], function: _Map) -> mx.array:
    """The float64 sum of a function's values over all parts, and the count of partial sums that are not finite."""
    partials = _partial_sums(list(parts), function)
    return _combined([mx.sum(part.astype(mx.float64, stream=mx.cpu), stream=mx.cpu) for part in partials], mx.sum)


def _combined(values: list[mx.array], combine: Callable[..., mx.array]) -> mx.array:
    cpu = mx.cpu
    if not values:
        return mx.zeros((2,), mx.float64, stream=cpu)
    stacked = mx.stack(values, stream=cpu)
    bad = mx.logical_not(mx.isfinite(stacked, stream=cpu), stream=cpu).astype(mx.float64, stream=cpu)
    return mx.stack([combine(stacked, stream=cpu), mx.sum(bad, stream=cpu)], stream=cpu)


_Part = tuple[mx.array, Any]  # an array of float32 or wider (or half: widened piece by piece), and its stream


def _real_parts(leaves: list[mx.array], stream: Stream, magnitudes: bool = False) -> Iterator[_Part]:
    for leaf in leaves:
        on = stream_of(leaf, stream)
        if leaf.size == 0:
            continue
        if leaf.dtype != mx.complex64:
            yield leaf, on
        elif magnitudes:
            yield mx.abs(leaf, stream=on), on
        else:  # |z|**2 without the square root
            yield mx.real(leaf, stream=on), on
            yield mx.imag(leaf, stream=on), on


def _widened(x: mx.array, stream: Stream) -> mx.array:
    return x if x.dtype in (mx.float32, mx.float64) else x.astype(mx.float32, stream=stream)


def _partial_sums(parts: list[_Part], function: _Map) -> Iterator[mx.array]:
    """Arrays whose values, each made of at most TERMS float32 additions, add up to the function's sum."""
    alike: dict[tuple[int, ...], int] = defaultdict(int)
    for part, _ in parts:
        alike[part.shape] += 1
    tiny: dict[mx.Dtype, list[_Part]] = defaultdict(list)
    running: dict[Any, tuple[mx.array | None, int]] = {}
    for part, on in parts:
        if part.size <= TINY:
            tiny[part.dtype].append((part, on))
            continue
        for piece in _pieces(part, alike[part.shape], on):
            key = piece.shape, piece.dtype
            so_far, terms = running.pop(key, (None, 0))
            if so_far is not None:  # one after the other: left alone, MLX squares many pieces before it adds any
                piece = mx.depends(piece, so_far)
            values = function(_widened(piece, on), on)
            if so_far is not None and terms == TERMS:
                yield so_far
                so_far = None
            running[key] = (values, 1) if so_far is None else (mx.add(so_far, values, stream=on), terms + 1)
    yield from (so_far for so_far, _ in running.values() if so_far is not None)
    for group in tiny.values():
        flat = [mx.reshape(part, (-1,), stream=on) for part, on in group]
        joined = mx.concatenate(flat, stream=group[0][1]) if len(flat) > 1 else flat[0]
        yield function(joined.astype(mx.float64, stream=mx.cpu), mx.cpu)


def _pieces(x: mx.array, alike: int, stream: Stream) -> Iterator[mx.array]:
    """Cut a leaf so that pieces of one shape, over all leaves ``alike`` in shape, come in groups of about TERMS.

    The gradient of a linear layer arrives transposed in memory, and an operation cannot see which it is. So a matrix
    is cut across its longer axis, and lies with that axis last: runs of memory stay long in both orders.
    """
    if x.ndim > 2:
        if x.size // x.shape[0] >= LEAST_PIECE:
            for part in mx.split(x, x.shape[0], axis=0, stream=stream):
                yield from _pieces(mx.squeeze(part, 0, stream=stream), alike * x.shape[0], stream)
            return
        x = mx.reshape(x, (-1,), stream=stream)
    parts = max(math.ceil(x.size / PIECE), min(TERMS // alike, x.size // LEAST_PIECE))
    if parts <= 1:
        yield x
        return
    if x.ndim == 2 and x.shape[0] >= x.shape[1]:
        x = mx.transpose(x, stream=stream)
    length = x.shape[-1]
    step = max(length // parts, 1)
    yield from mx.split(x, list(range(step, length, step)), axis=-1, stream=stream)
