"""The passes over the gradients, local to this rank: measure each leaf, scale leaves, select between old and new.

On a CPU stream the native kernel does them: float64 sums at the speed of memory, and results in place where nothing
else holds the gradient. On a GPU, and where the kernel was not built, MLX operations do. Sums are by leaf: weights,
groups and layouts are the caller's.
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
    """The sum of ``|x|**2`` of each leaf, and how many of its values are not finite.

    The MLX operations count the leaf's sum, not its values; either count is 0 if and only if all is finite.

    Args:
        leaves: arrays of any shape and dtype, what this rank holds. float64 leaves are summed on the CPU.
        stream: where the work is done; the last additions are always on the CPU.

    Returns:
        mlx.core.array: float64, shape (leaves, 2).
    """
    return (native(stream) or operations).sum_squares(leaves, stream)


def sum_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` of each leaf, and how many of its values are not finite, as in :func:`sum_squares`."""
    return (native(stream) or operations).sum_abs(leaves, stream)


def max_abs(leaves: list[mx.array], stream: Stream = None) -> mx.array:
    """The largest ``|x|`` of each leaf (NaN if any value is), and how many of its values are not finite, as in
    :func:`sum_squares`."""
    return (native(stream) or operations).max_abs(leaves, stream)


def sum_powers(leaves: list[mx.array], p: float, unit: mx.array, stream: Stream = None) -> mx.array:
    """The sum of ``(|x| / unit)**p`` of each leaf, not finite where a value is not: by MLX operations.

    Args:
        leaves, stream: as in :func:`sum_squares`.
        unit: float64, shape (); a power of two not below the largest magnitude, so that no power overflows, or 1.

    Returns:
        mlx.core.array: float64, shape (leaves,).
    """
    return operations.sum_powers(leaves, p, unit, stream)


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
    return (native(stream) or operations).scale(leaves, factor, finite, stream)


def select(condition: mx.array, updated: list[mx.array], old: list[mx.array], stream: Stream = None) -> list[mx.array]:
    """Each updated array where the condition holds, else the old one in its place, bit for bit.

    Args:
        condition: bool, shape ().
        updated, old: arrays of the same shapes and dtypes. The native kernel returns an updated array that nothing else
            holds as it is, without reading or writing it, while the condition holds.
        stream: where the work is done.
    """
    return (native(stream) or operations).select(condition, updated, old, stream)
