"""Scale many small leaves on a GPU: a launch for up to 9 of them, into new row-major arrays."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from distclip.engine import operations
from distclip.engine.gpu import source
from distclip.engine.gpu.launches import LEAST, Launch, Shape, launches, passed
from distclip.engine.operations import Stream


def scale(
    leaves: list[mx.array], factor: mx.array, finite: mx.array | None = None, stream: Stream = None
) -> list[mx.array]:
    """Every leaf times a factor, in float32, rounded once to the type of the leaf. Has no derivative.

    Args:
        leaves: floating arrays of fewer than 2**31 values. float64 leaves are scaled on the CPU.
        factor: float32, shape (), or (leaves,) for a factor of its own for each leaf.
        finite: bool, shape (); zeros instead of products where it is False. None: always products.
        stream: where the work is done.

    Raises:
        ValueError: the factor has another shape.
    """
    if factor.shape not in ((), (len(leaves),)):
        raise ValueError("factor should be a scalar or hold one value for each leaf")
    own = factor.ndim == 1
    scaled = [_elsewhere(leaf, factor[i] if own else factor, finite) for i, leaf in enumerate(leaves)]
    grouped = _launches(tuple((leaf.shape, leaf.dtype) for leaf in leaves), own)
    if not grouped:
        return scaled
    common = [_factors(factor, stream), _flag(finite, stream)]
    for launch in grouped:
        for i, product in zip(launch.leaves, _products(launch, leaves, common, stream), strict=False):
            scaled[i] = product
    return scaled


def _elsewhere(leaf: mx.array, factor: mx.array, finite: mx.array | None) -> mx.array:
    """A leaf of float64, which is on the CPU; the kernel's and empty ones as they are."""
    if leaf.dtype in source.VALUES:
        return leaf
    return operations.scale([leaf], factor, finite, mx.cpu)[0]


@lru_cache(maxsize=64)
def _launches(leaves: tuple[tuple[Shape, mx.Dtype], ...], own: bool) -> list[Launch]:
    return list(launches(source.SCALE, leaves, factors=own))


def _products(launch: Launch, leaves: list[mx.array], common: list[mx.array], stream: Stream) -> list[mx.array]:
    absent = source.SCALE.leaves - len(launch.leaves)
    return source.kernel(source.scaling(launch.dtype, source.backend()))(
        inputs=[*passed(source.SCALE, launch, leaves, stream), launch.table, *common],
        output_shapes=[leaves[i].shape for i in launch.leaves] + [(1,)] * absent,
        output_dtypes=[launch.dtype] * source.SCALE.leaves,
        stream=stream,
        **launch.grid,
    )


def _factors(factor: mx.array, stream: Stream) -> mx.array:
    """All factors in memory one after the other, and never fewer than the kernel's signature needs."""
    if factor.ndim == 0:
        return mx.broadcast_to(factor, (LEAST,), stream=stream)  # a view: all leaves have the first
    if factor.size < LEAST:
        factor = mx.broadcast_to(factor, (LEAST, factor.size), stream=stream)
    return mx.contiguous(factor, stream=stream)


def _flag(finite: mx.array | None, stream: Stream) -> mx.array:
    return mx.broadcast_to(mx.array(True) if finite is None else finite, (LEAST,), stream=stream)
