"""The two passes over the gradients, local to this rank: measure them, and scale them.

On a CPU stream the native kernel does both: float64 sums at the speed of memory, and scaled in place where nothing else
holds the gradient. On a GPU, and where the kernel was not built, MLX operations do.
"""

from __future__ import annotations

import mlx.core as mx

from distclip.engine import operations
from distclip.engine.native import Kernel, load
from distclip.engine.operations import Stream


def engine(stream: Stream = None) -> str:
    """What works on the leaves: ``"native"`` (the C++ kernel) or ``"mlx"`` (MLX operations).

    Args:
        stream (mlx.core.Stream, optional): for which stream or device. Default: the default device.
    """
    return "mlx" if native(stream) is None else "native"


def native(stream: Stream) -> Kernel | None:
    """The kernel, if it is there and the stream is one of the CPU."""
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    return load() if device == mx.cpu else None


def sum_squares(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|**2`` over all leaves, and how many values are not finite: float64, shape (2,).

    The MLX operations count what they see, sums over many values; either count is 0 if and only if all is finite.

    Args:
        leaves: arrays of any shape and dtype, what this rank holds. float64 leaves are summed on the CPU.
        stream: where the work is done; the last additions are always on the CPU.
    """
    kernel = native(stream)
    if kernel is None:
        return operations.sum_squares(leaves, stream)
    return kernel.sum_squares(leaves, stream)


def sum_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` over all leaves, and how many values are not finite, as in :func:`sum_squares`."""
    kernel = native(stream)
    if kernel is None:
        return operations.sum_abs(leaves, stream)
    return kernel.sum_abs(leaves, stream)


def max_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The largest ``|x|`` (NaN if any value is), and how many values are not finite, as in :func:`sum_squares`."""
    kernel = native(stream)
    if kernel is None:
        return operations.max_abs(leaves, stream)
    return kernel.max_abs(leaves, stream)


def sum_powers(leaves: list[mx.array], p: float, stream: Stream = None) -> tuple[mx.array, mx.array, mx.array]:
    """A unit, the sum of ``(|x| / unit)**p`` over all leaves, and how many values are not finite: float64, shape ().

    The unit is a power of two at or just above the largest magnitude, so that no power over- or underflows; 0 where
    every value is 0. The sum is infinite or NaN where a value is.
    """
    largest = max_abs(leaves, stream)
    with mx.stream(mx.cpu):
        largest, bad = largest[0], largest[1]
    return *operations.sum_powers(leaves, p, largest, stream), bad


def scale(
    leaves: list[mx.array], factor: mx.array, finite: mx.array | None = None, stream: Stream = None
) -> list[mx.array]:
    """Every leaf times one factor. Floating leaves keep their type; integers become float32, as in MLX.

    Args:
        leaves: arrays of any shape and dtype. The native kernel writes into the buffer of a leaf that nothing else
            holds, and writes nothing if the factor is 1 besides.
        factor: float32, shape ().
        finite: bool, shape (); zeros instead of products where it is False. None: always products.
        stream: where the work is done.
    """
    kernel = native(stream)
    if kernel is None:
        return operations.scale(leaves, factor, finite, stream)
    return kernel.scale(leaves, factor, finite, stream)


def choose(condition: mx.array, updated: list[mx.array], old: list[mx.array], stream: Stream = None) -> list[mx.array]:
    """Each updated array where the condition holds, else the old one in its place, bit for bit.

    Args:
        condition: bool, shape ().
        updated, old: arrays of the same shapes and dtypes. The native kernel returns an updated array that nothing else
            holds as it is, without reading or writing it, while the condition holds.
        stream: where the work is done.
    """
    kernel = native(stream)
    if kernel is None:
        return [
            mx.where(condition, a, b, stream=operations.stream_of(a, stream)) for a, b in zip(updated, old, strict=True)
        ]
    return kernel.choose(condition, updated, old, stream)
