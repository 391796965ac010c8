"""The C++ kernel: built for one version of MLX, and loaded by that version alone."""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx

from distclip.engine import REBUILD


class Arriving(Protocol):
    """Leaves on their way through an all-reduce."""

    measured: mx.array  # as the sums over the ranks will be: float64, shape (2,)

    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> list[mx.array]: ...


class Kernel(Protocol):
    """The functions of the C++ module. The stream is one of the CPU; integers count, and come back, as float32."""

    instructions: str  # "avx512", "avx2" or "baseline"
    threads: int  # that share large leaves

    def sum_squares(self, leaves: list[mx.array], stream: Any) -> mx.array: ...
    def sum_abs(self, leaves: list[mx.array], stream: Any) -> mx.array: ...
    def max_abs(self, leaves: list[mx.array], stream: Any) -> mx.array: ...
    def scale(
        self, leaves: list[mx.array], factor: mx.array, finite: mx.array | None, stream: Any
    ) -> list[mx.array]: ...
    def choose(
        self, condition: mx.array, updated: list[mx.array], old: list[mx.array], stream: Any
    ) -> list[mx.array]: ...
    def sum_over_ranks(
        self,
        leaves: list[mx.array],
        group: mx.distributed.Group,
        magnitudes: bool,
        before: float,
        wire: mx.Dtype | None,
        bucket_bytes: int,
        stream: Any,
    ) -> Arriving: ...
    def scheduled_all_reduces(self) -> int: ...  # by sum_over_ranks in this process


@cache
def load() -> Kernel | None:
    """The kernel, or None where it was not built or the environment variable ``DISTCLIP_ENGINE=mlx`` forbids it.

    Warns once if a kernel is there that cannot be loaded, usually since it was built for another version of MLX.

    Raises:
        ImportError: it cannot be loaded, and ``DISTCLIP_ENGINE=native`` demands it.
    """
    wanted = os.environ.get("DISTCLIP_ENGINE")
    if wanted == "mlx":
        return None
    running = version("mlx")
    try:
        return cast(Kernel, import_module(f"{__name__}.{module_name(running)}"))
    except ModuleNotFoundError:
        built = sorted(path.name.split(".")[0] for path in Path(__file__).parent.glob("mlx_*.so"))
        found = ", ".join(one.removeprefix("mlx_").replace("_", ".") for one in built)
        problem = f"was built for mlx {found}, and mlx {running} is running" if built else ""
    except ImportError as error:
        problem = f"could not be loaded: {error}"
    if wanted == "native":
        raise ImportError(f"distclip's kernel {problem or 'was not built'}. Build it: {REBUILD}")
    if problem:
        _warn(problem)
    return None


def module_name(mlx_version: str) -> str:
    """The kernel's module for a version of MLX: another one may have another layout of its objects in memory."""
    return "mlx_" + re.sub(r"\W", "_", mlx_version)


def _warn(problem: str) -> None:
    warnings.warn(
        f"distclip's kernel {problem}, so MLX operations do its work, several times slower on the CPU. "
        f"Build it again: {REBUILD}",
        RuntimeWarning,
        stacklevel=5,
    )
