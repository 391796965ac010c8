"""The passes over leaves by kernels for Metal and CUDA, which MLX compiles where they run.

They are given out only where they measure and scale a small tree rightly: no GPU was at hand when they were written.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import mlx.core as mx

from distclip.engine.gpu import source, verify
from distclip.engine.gpu.measuring import measure
from distclip.engine.gpu.scaling import scale as scale
from distclip.engine.operations import Stream

Arrays = list[mx.array]


class Kernels(Protocol):
    """The functions of this package. The stream is one of the GPU; integers count as float32."""

    def sum_squares(self, leaves: Arrays, stream: Any = None) -> mx.array: ...
    def sum_abs(self, leaves: Arrays, stream: Any = None) -> mx.array: ...
    def max_abs(self, leaves: Arrays, stream: Any = None) -> mx.array: ...
    def scale(self, leaves: Arrays, factor: mx.array, finite: mx.array | None = None, stream: Any = None) -> Arrays: ...


def sum_squares(leaves: Arrays, stream: Stream = None) -> mx.array:
    """The sum of ``|x|**2`` of each leaf, and how many of its values are not finite: float64, shape (leaves, 2).

    Args:
        leaves, stream: as in :func:`distclip.engine.kernels.sum_squares`. A complex value counts as two.
    """
    return measure("squares", leaves, stream)


def sum_abs(leaves: Arrays, stream: Stream = None) -> mx.array:
    """The sum of ``|x|`` of each leaf, and how many of its values are not finite: float64, shape (leaves, 2)."""
    return measure("magnitudes", leaves, stream)


def max_abs(leaves: Arrays, stream: Stream = None) -> mx.array:
    """The largest ``|x|`` of each leaf (NaN if any value is), and how many are not finite: float64, (leaves, 2)."""
    return measure("largest", leaves, stream)


@cache
def load() -> Kernels | None:
    """The kernels, or None where MLX has no GPU or the environment variable ``DISTCLIP_ENGINE=mlx`` forbids them.

    Evaluates a small tree on the GPU, once. Warns if there is a GPU on which the kernels do not work.

    Raises:
        ImportError: they do not work, and ``DISTCLIP_ENGINE=gpu`` demands them.
    """
    what = problem()
    if not what:
        import distclip.engine.gpu as kernels

        return kernels
    if os.environ.get("DISTCLIP_ENGINE") == "gpu":
        raise ImportError(f"DISTCLIP_ENGINE=gpu, but {what}")
    if source.backend() and os.environ.get("DISTCLIP_ENGINE") != "mlx":
        warnings.warn(
            f"{what}, so MLX operations do the work, several times slower. Please report this line as a bug of distclip"
            f", with the GPU's name; mlx {version('mlx')}.",
            RuntimeWarning,
            stacklevel=5,
        )
    return None


@cache
def problem() -> str:
    """Why the kernels do not work here, in a sentence without its full stop; empty if they do."""
    if os.environ.get("DISTCLIP_ENGINE") == "mlx":
        return "DISTCLIP_ENGINE=mlx forbids the kernels for GPUs"
    if not source.backend():
        return "MLX has neither Metal nor CUDA here"
    what = verify.problem()
    return what and f"distclip's kernels for {'CUDA' if source.backend() == 'cuda' else 'Metal'} {what}"
