"""The passes over the gradients by MLX operations: where neither the native kernel nor that of a GPU works.

On the CPU leaves are summed by blocks (:mod:`distclip.engine.blocks`), on a device by fused operations
(:mod:`distclip.engine.fused`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from distclip.engine import blocks, fused
from distclip.engine.streams import Stream, is_device, stream_of, working_on


def sum_squares(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|**2`` of each leaf, and 1 where it is not finite, else 0: float64, shape (leaves, 2).

    Args:
        leaves: arrays of any shape and dtype, what this rank holds; no float64 for a device.
        stream: where the float32 work is done; the last additions are always on the CPU.
    """
    if is_device(stream):
        return _counted(fused.sums(leaves, _square, stream))
    return _counted(blocks.sums(leaves, _square, _parts, stream))


def sum_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` of each leaf, and 1 where it is not finite, else 0: float64, shape (leaves, 2)."""
    if is_device(stream):
        return _counted(fused.sums(leaves, _magnitude, stream))
    return _counted(blocks.sums(leaves, _magnitude, _magnitude, stream))


def max_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The largest ``|x|`` of each leaf (NaN if any value is), and 1 where it is not finite, else 0: float64,
    shape (leaves, 2)."""
    if is_device(stream):
        return _counted(fused.largest(leaves, _magnitude, stream))
    return _counted(blocks.largest(leaves, stream))


def sum_powers(leaves: list[mx.array], p: float, unit: mx.array, stream: Stream = None) -> mx.array:
    """The sum of ``(|x| / unit)**p`` of each leaf: float64, shape (leaves,). See :mod:`distclip.engine.kernels`."""
    shrink = mx.reciprocal(unit, stream=mx.cpu)
    if is_device(stream):
        return fused.sums(leaves, _power(p), stream, shrink)
    return blocks.sums(
        leaves, lambda x, on: _power(p)(x, on, shrink.astype(x.dtype, stream=mx.cpu)), _magnitude, stream
    )


def scale(leaves: list[mx.array], factor: mx.array, finite: mx.array | None, stream: Stream = None) -> list[mx.array]:
    """Every leaf times a float32 factor. Floating leaves keep their type; integers become float32, as in MLX."""
    flag = () if finite is None else (finite,)
    with working_on(stream):
        factors = [factor] * len(leaves)
        if factor.ndim > 0 and leaves:
            parts = mx.split(factor, len(leaves))  # one graph node
            factors = [x if leaf.ndim > 0 else mx.squeeze(x, 0) for x, leaf in zip(parts, leaves, strict=True)]
        on_device = is_device(stream)
        return [
            (_scaled_in_one_launch() if on_device and _can_compile(leaf) else _scaled)(leaf, own, *flag)
            for leaf, own in zip(leaves, factors, strict=True)
        ]


def _can_compile(leaf: mx.array) -> bool:
    # A compiled function of any shape gives an empty leaf a value, and a device has no float64.
    return leaf.size > 0 and leaf.dtype != mx.float64


@cache
def _scaled_in_one_launch() -> Any:
    """On a device: one read and one write for each leaf, in place where it is given up, with no wider array between.
    Within another compiled function the product is fused with what follows it."""
    return mx.compile(_scaled, shapeless=True)


def _scaled(leaf: mx.array, factor: mx.array, finite: mx.array | None = None) -> mx.array:
    stream = stream_of(leaf, None)
    product = mx.multiply(leaf, factor, stream=stream)
    # Cast after the product, in which a small factor does not underflow.
    scaled = product.astype(leaf.dtype, stream=stream) if mx.issubdtype(leaf.dtype, mx.inexact) else product
    if finite is None:
        return scaled
    return mx.where(finite, scaled, mx.zeros((), scaled.dtype, stream=stream), stream=stream)


def select(condition: mx.array, updated: list[mx.array], old: list[mx.array], stream: Stream = None) -> list[mx.array]:
    """Each updated array where the condition holds, else the old array of its place."""
    return [mx.where(condition, a, b, stream=stream_of(a, stream)) for a, b in zip(updated, old, strict=True)]


def _square(x: mx.array, on: Stream) -> mx.array:
    if x.dtype == mx.complex64:
        return mx.add(_square(mx.real(x, stream=on), on), _square(mx.imag(x, stream=on), on), stream=on)
    return mx.square(x, stream=on)


def _magnitude(x: mx.array, on: Stream) -> mx.array:
    return mx.abs(x, stream=on)


@cache
def _power(p: float) -> Any:
    def power(x: mx.array, on: Stream, shrink: mx.array) -> mx.array:
        return mx.power(mx.multiply(mx.abs(x, stream=on), shrink, stream=on), p, stream=on)

    return power


def _parts(leaf: mx.array, stream: Stream) -> mx.array:
    """A complex leaf as its real and imaginary parts: ``|z|**2`` without the square root."""
    return mx.stack([mx.real(leaf, stream=stream), mx.imag(leaf, stream=stream)], stream=stream)


def _counted(values: mx.array) -> mx.array:
    """A value of each leaf beside whether it is not finite: float64, shape (leaves, 2)."""
    nonfinite = mx.logical_not(mx.isfinite(values, stream=mx.cpu), stream=mx.cpu).astype(mx.float64, stream=mx.cpu)
    return mx.stack([values, nonfinite], axis=1, stream=mx.cpu)
