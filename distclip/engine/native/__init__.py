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

Arrays = list[mx.array]


class Sums(Protocol):
    """The sums of leaves over the ranks, on their way."""

    @property
    def measured(self) -> mx.array: ...  # of each leaf's sum: float64, shape (leaves, 2)
    @property
    def leaves(self) -> Arrays: ...  # each leaf's sum; by MLX operations only
    @property
    def arriving(self) -> Arrays: ...  # what comes from the network
    def scaled(self, factor: mx.array, finite: mx.array | None = None) -> Arrays: ...


class Node(Protocol):
    """An operation that was not evaluated yet. Of an array it has the id, the values and the bytes."""

    name: str
    stream: mx.Stream
    inputs: list[tuple[int, int, int]]
    outputs: list[tuple[int, int, int]]


class Kernel(Protocol):
    """The functions of the C++ module. The stream is one of the CPU; integers count, and come back, as float32."""

    instructions: str  # "avx512", "avx2" or "baseline"
    threads: int  # that share large leaves

    def sum_squares(self, leaves: Arrays, stream: Any) -> mx.array: ...
    def sum_abs(self, leaves: Arrays, stream: Any) -> mx.array: ...
    def max_abs(self, leaves: Arrays, stream: Any) -> mx.array: ...
    def scale(self, leaves: Arrays, factor: mx.array, finite: mx.array | None, stream: Any) -> Arrays: ...
    def select(self, condition: mx.array, updated: Arrays, old: Arrays, stream: Any) -> Arrays: ...
    def sleep(self, x: mx.array, seconds: float, stream: Any) -> mx.array: ...  # the array, some seconds later
    def sum_over_ranks(self, *arguments: Any) -> Sums: ...  # see distclip.engine.buckets
    def ids(self, arrays: Arrays) -> list[tuple[int, int, int]]: ...  # as a Node has them; in-place updates change them
    def graph(self, arrays: Arrays) -> list[Node]: ...  # the operations that arrays wait for, the first first
    def depths(self, arrays: Arrays) -> list[int]: ...  # how many operations lie one after the other before each
    def scheduled_all_reduces(self) -> int: ...  # by sum_over_ranks in this process


@cache
def load() -> Kernel | None:
    """The kernel, or None where it was not built or the environment variable ``DISTCLIP_ENGINE=mlx`` forbids it.

    Warns once if a kernel is there that cannot be loaded or does not measure rightly, usually since it was built for
    another version of MLX.

    Raises:
        ImportError: there is no kernel that works, and ``DISTCLIP_ENGINE=native`` demands it.
    """
    wanted = os.environ.get("DISTCLIP_ENGINE")
    if wanted == "mlx":
        return None
    running = version("mlx")
    try:
        kernel = cast(Kernel, import_module(f"{__name__}.{module_name(running)}"))
        problem = _problem_of(kernel)
        if not problem:
            return kernel
    except ModuleNotFoundError:
        # An editable install has the kernel in another folder than this file.
        built = sorted(path.name.split(".")[0] for folder in __path__ for path in Path(folder).glob("mlx_*.so"))
        versions = ", ".join(name.removeprefix("mlx_").replace("_", ".") for name in built)
        problem = f"was built for mlx {versions}, and mlx {running} is running" if built else ""
    except ImportError as error:
        problem = f"could not be loaded: {error}"
    if wanted == "native":
        raise ImportError(f"distclip's kernel {problem or 'was not built'}. In a clone, build it: {REBUILD}")
    if problem:
        _warn(problem)
    return None


def _problem_of(kernel: Kernel) -> str:
    """What is wrong with a kernel that was loaded: it may take MLX's arrays for something else."""
    try:
        measured = kernel.sum_squares([mx.array([3.0, 4.0])], mx.cpu).tolist()
    except (TypeError, RuntimeError) as error:  # nanobind's own version is another
        return f"cannot work with MLX's arrays: {str(error).splitlines()[0]}"
    return "" if measured == [[25.0, 0.0]] else f"measures 3 and 4 as {measured}, not as 25"


def module_name(mlx_version: str) -> str:
    """The kernel's module for a version of MLX: another one may have another layout of its objects in memory."""
    return "mlx_" + re.sub(r"\W", "_", mlx_version)


def _warn(problem: str) -> None:
    warnings.warn(
        f"distclip's kernel {problem}, so MLX operations do its work, several times slower on the CPU. "
        f"In a clone, build it again: {REBUILD}",
        RuntimeWarning,
        stacklevel=5,
    )
