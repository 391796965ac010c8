"""A GPU that is not there: runs the kernels of distclip.engine.gpu on the CPU, from the source that MLX generates.

MLX records a Metal kernel without Metal while it exports a function, and prints its source. g++ compiles that with
shim.h and harness.cpp, and an object with the call of ``mx.fast.metal_kernel``'s runs it on the arrays as they are in
memory. It evaluates them, so it works under mx.grad; inside mx.compile MLX operations stand in for the kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from distclip.engine import gpu
from distclip.engine.gpu import source
from distclip.engine.gpu.source import THREADS, Source

from . import traced
from .generated import Kinds, Parameter, generated, kinds_of

HERE = Path(__file__).parent
STRICT = ("-O2", "-mfma", "-ffp-contract=off")
STATUS = ["", "some threads of a group missed a barrier", "memory was read that is not there"]  # as in harness.cpp
needs_emulation = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulation needs g++ and x86-64"
)


@dataclass
class Emulation:
    """How the GPU works: the order of threads, subnormals, the compiler's options, a mistake planted in the source.

    Args:
        spelling: ``"metal"`` or ``"cuda"``.
        order: of a group's threads: 0 rising, 1 falling, else another random order after each barrier.
        flush: subnormals count as 0 in arithmetic, and become 0.
        flags: of g++.
        mistake: a text that the source has, and what stands in its place.
    """

    spelling: str = "metal"
    order: int = 0
    flush: bool = False
    flags: tuple[str, ...] = STRICT
    mistake: tuple[str, str] | None = None
    launches: list[str] = field(default_factory=list)  # the kernels that ran

    def kernel(self, source: Source) -> Callable[..., list[mx.array]]:
        """In place of :func:`distclip.engine.gpu.source.kernel`."""
        return partial(self.launch, source)

    def launch(
        self,
        source: Source,
        *,
        inputs: list[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        stream: Any = None,
    ) -> list[mx.array]:
        try:
            mx.eval(inputs)
        except ValueError:
            if source.outputs != ("columns",):
                raise  # leaves are not scaled by kernels inside a trace
            return traced.measured(source, inputs, grid[0] // threadgroup[0])
        written = [np.full(s, 0xFF, np.uint8) for s in _bytes(output_shapes, output_dtypes)]
        groups = grid[0] // threadgroup[0]
        self.run(source, kinds_of(inputs), output_dtypes, [*map(_memory, inputs), *written], groups)
        return [_array(*made) for made in zip(written, output_shapes, output_dtypes, strict=True)]

    def run(self, source: Source, kinds: Kinds, outputs: Sequence[mx.Dtype], arrays: list[Any], groups: int) -> None:
        """Run a kernel on arrays of NumPy's: its inputs, of these kinds, and its outputs."""
        self.launches.append(source.name)
        text, parameters = generated(source, kinds, tuple(outputs), self.spelling)
        if self.mistake is not None:
            text = text.replace(*self.mistake)
        named = dict(zip((*source.inputs, *source.outputs), arrays, strict=True))
        named |= {f"{name}_strides": _strides(x) for name, x in named.items()}
        pointers = [named[p.name].ctypes.data for p in parameters if p.is_array]
        run = _compiled(text, parameters, self.flags)
        status = run((ctypes.c_void_p * len(pointers))(*pointers), groups, THREADS, self.order, self.flush)
        assert status == 0, STATUS[status]


@contextmanager
def emulated(emulation: Emulation | None = None) -> Iterator[Emulation]:
    """A GPU, which :mod:`distclip.engine.gpu` takes for one of MLX, on the CPU's streams."""
    emulation = emulation or Emulation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "kernel", emulation.kernel)
        patch.setattr(source, "backend", lambda: emulation.spelling)
        patch.setattr(source, "device", lambda: mx.Device(mx.cpu, 0))
        _forget()
        try:
            yield emulation
        finally:
            _forget()


def _forget() -> None:
    gpu.load.cache_clear()
    gpu.problem.cache_clear()


def _memory(x: mx.array) -> Any:
    """The array's own memory, with its strides; bfloat16, which NumPy lacks, as its bits."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def _strides(x: Any) -> Any:
    steps = [step // x.itemsize for step in x.strides]
    return np.array(steps + [-(2**40)] * (10 - len(steps)), np.int64)  # a stride that no axis has leads far away


def _bytes(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[mx.Dtype]) -> list[int]:
    return [int(np.prod(shape)) * dtype.size for shape, dtype in zip(shapes, dtypes, strict=True)]


def _array(memory: Any, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.reshape(mx.array(memory).view(dtype), shape)


@cache
def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="distclip-emulation-")


@cache
def _compiled(text: str, parameters: tuple[Parameter, ...], flags: tuple[str, ...]) -> Any:
    name = re.search(r"void (custom_kernel_\w+)\(", text)
    assert name is not None
    arrays = itertools.count()  # the harness has the memory of a threadgroup

    def shared(found: re.Match[str]) -> str:
        return f"  {found[1]}* {found[2]} = shared_array<{found[1]}[{found[3]}]>({next(arrays)});"

    text = re.sub(r"^  (?:threadgroup|__shared__) (\w+) (\w+)\[(.+)\];", shared, text, flags=re.M)
    call = ", ".join(p.argument(i) for i, p in enumerate(parameters))
    program = f'#include "shim.h"\n{text}\n#define CALL {name[1]}({call})\n#include "harness.cpp"\n'
    if "__global__" in text:
        program = "#define EMULATE_CUDA\n" + program.replace("#define CALL ", "#define CALL mlx::core::cu::")
    path = Path(_folder().name) / hashlib.sha256((program + " ".join(flags)).encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(program)
    options = ["-std=c++20", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", f"-I{HERE}", *flags]
    made = [str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))]
    done = subprocess.run(["g++", *options, *made], capture_output=True, text=True, timeout=100)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if " error: " in line]
        raise RuntimeError("\n".join(["Unable to build metal library from source", *errors]))  # as MLX does
    return ctypes.CDLL(str(path.with_suffix(".so"))).run
