"""The passes over the gradients, local to this rank: measure each leaf, scale leaves, select between old and new.

On a CPU stream the native kernel does them: float64 sums at the speed of memory, and results in place where nothing
else holds the gradient. On a GPU a kernel of Metal or CUDA measures. MLX operations serve where a kernel does not work.
Sums are by leaf: weights, groups and layouts are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from distclip.engine import gpu, native, operations
from distclip.engine.order import in_order
from distclip.engine.streams import Stream, is_device, is_traced, start, to_device

GROUPED = 1 << 12  # leaves of a device up to this size are scaled several in a launch

Measure = Callable[[list[mx.array], Stream], mx.array]


def engine(stream: Stream = None) -> str:
    """What works on the leaves: ``"native"`` (the C++ kernel), ``"gpu"`` (Metal's or CUDA's) or ``"mlx"`` (MLX
    operations).

    Args:
        stream (mlx.core.Stream, optional): for which stream or device. Default: the default device.
    """
    if _of(stream) is operations:
        return "mlx"
    return "gpu" if is_device(stream) else "native"


def native_kernel(stream: Stream) -> native.Kernel | None:
    """The C++ kernel, if it is there and the stream is of the CPU."""
    return None if is_device(stream) else native.load()


def sum_squares(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|**2`` of each leaf, and how many of its values are not finite.

    The MLX operations count the leaf's sum, not its values; either count is 0 if and only if all is finite.

    Args:
        leaves: arrays of any shape and dtype, what this rank holds. float64 leaves are summed on the CPU.
        stream: where the work is done; the last additions are always on the CPU.

    Returns:
        mlx.core.array: float64, shape (leaves, 2).
    """
    return _by_leaf(lambda some, on: _of(on).sum_squares(some, on), leaves, stream)


def sum_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` of each leaf, and how many of its values are not finite, as in :func:`sum_squares`."""
    return _by_leaf(lambda some, on: _of(on).sum_abs(some, on), leaves, stream)


def sums_of(leaves: list[mx.array], norm_type: float, stream: Stream = None) -> mx.array:
    """The sum of squares of each leaf for the 2-norm, of magnitudes for the 1-norm, and its count, as in
    :func:`sum_squares`."""
    return (sum_squares if norm_type == 2 else sum_abs)(leaves, stream)


def max_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The largest ``|x|`` of each leaf (NaN if any value is), and how many of its values are not finite, as in
    :func:`sum_squares`."""
    return _by_leaf(lambda some, on: _of(on).max_abs(some, on), leaves, stream)


def sum_powers(leaves: list[mx.array], p: float, unit: mx.array, stream: Stream = None) -> mx.array:
    """The sum of ``(|x| / unit)**p`` of each leaf, not finite where a value is not: by MLX operations.

    Args:
        leaves, stream: as in :func:`sum_squares`.
        unit: float64, shape (); a power of two not below the largest magnitude, so that no power overflows, or 1.

    Returns:
        mlx.core.array: float64, shape (leaves,).
    """
    return _by_leaf(lambda some, on: operations.sum_powers(some, p, unit, on), leaves, stream)


def scale(
    leaves: list[mx.array], factor: mx.array, finite: mx.array | None = None, stream: Stream = None
) -> list[mx.array]:
    """Every leaf times a factor. Floating leaves keep their type; integers become float32, as in MLX.

    Args:
        leaves: arrays of any shape and dtype. The native kernel writes into the buffer of a leaf that nothing else
            holds, and writes nothing if the factor is 1 besides.
        factor: float32, shape (), or (leaves,) for a factor of its own for each leaf.
        finite: bool, shape (); zeros instead of products where it is False. None: always products.
        stream: where the work is done.

    Raises:
        ValueError: the factor has another shape.
    """
    if factor.shape not in ((), (len(leaves),)):
        raise ValueError("factor should be a scalar or hold one value for each leaf")
    start(leaves, stream)
    if is_device(stream):
        return _scaled_on_device(leaves, factor, finite, stream)
    return (native.load() or operations).scale(leaves, factor, finite, stream)


def select(condition: mx.array, updated: list[mx.array], old: list[mx.array], stream: Stream = None) -> list[mx.array]:
    """Each updated array where the condition holds, else the old one in its place, bit for bit.

    Args:
        condition: bool, shape ().
        updated, old: arrays of the same shapes and dtypes. The native kernel returns an updated array that nothing else
            holds as it is, without reading or writing it, while the condition holds.
        stream: where the work is done.
    """
    (condition,) = to_device([condition], stream)
    return (native_kernel(stream) or operations).select(condition, updated, old, stream)


def changed(now: list[mx.array], before: list[mx.array]) -> list[bool]:
    """Whether each array is another one than its counterpart before, or was updated in place since that handle was
    made. Nothing is evaluated. Where the native kernel is missing nothing tells, and all count as changed."""
    kernel = native.load()
    if kernel is None:
        return [True] * len(now)
    return [a != b for a, b in zip(kernel.ids(now), kernel.ids(before), strict=True)]


def _of(stream: Stream) -> Any:
    """The engine for a stream, which has the functions of this file under their names."""
    return (gpu.load() if is_device(stream) else native.load()) or operations


def _by_leaf(measure: Measure, leaves: list[mx.array], stream: Stream) -> mx.array:
    """What is measured of each leaf, in the order of the leaves: on the CPU for float64, which no device has."""
    start(leaves, stream)
    if not is_device(stream):
        return measure(leaves, stream)
    wide, others = _apart(leaves, lambda leaf: leaf.dtype == mx.float64)
    if not wide:
        return measure(leaves, stream)
    measured = [measure([leaves[i] for i in indices], on) for indices, on in ((others, stream), (wide, mx.cpu))]
    return in_order(measured, others + wide)


def _apart(leaves: list[mx.array], test: Callable[[mx.array], bool]) -> tuple[list[int], list[int]]:
    """The numbers of the leaves that pass a test, and of the others."""
    passes = [test(leaf) for leaf in leaves]
    return [i for i, yes in enumerate(passes) if yes], [i for i, yes in enumerate(passes) if not yes]


def _scaled_on_device(
    leaves: list[mx.array], factor: mx.array, finite: mx.array | None, stream: Stream
) -> list[mx.array]:
    """Small leaves several in a launch, others each in a launch of its own. In a function that MLX traces all are
    products of MLX, which are fused there with what follows."""
    kernel = gpu.load()
    small, others = _apart(leaves, lambda leaf: leaf.size <= GROUPED and leaf.dtype in gpu.source.VALUES)
    if kernel is None or len(small) < 2 or is_traced([factor, leaves[small[0]]]):
        return operations.scale(leaves, factor, finite, stream)
    scaled = list(leaves)
    for scale_, indices in ((kernel.scale, small), (operations.scale, others)):
        if indices:
            some = [leaves[i] for i in indices]
            factors = factor if factor.ndim == 0 else mx.take(factor, mx.array(indices, mx.int32), stream=stream)
            for i, result in zip(indices, scale_(some, factors, finite, stream), strict=True):
                scaled[i] = result
    return scaled
