"""The whole source of a kernel, with the signature that MLX writes, and what the kernel is called with."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx

from distclip.engine.gpu.source import Source, make_kernel

CUDA_TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.float16: "__half",
    mx.complex64: "complex64_t",
    mx.int64: "int64_t",
    mx.bool_: "bool",
}
POSITIONS = {
    "thread_position_in_threadgroup": "thread_position",
    "threadgroup_position_in_grid": "group_position",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel."""

    type: str
    name: str

    @property
    def is_array(self) -> bool:
        return self.name not in POSITIONS

    def argument(self, buffer: int) -> str:
        if not self.is_array:
            return POSITIONS[self.name]
        if self.type.endswith("*"):
            return f"({self.type})buffers[{buffer}]"
        return f"*({self.type.removesuffix('&')}*)buffers[{buffer}]"


# What the signature depends on: the dtype of each input, whether it is 0-d, and whether it has less than 8 values.
Kinds = tuple[tuple[mx.Dtype, bool, bool], ...]


def kinds_of(inputs: Sequence[mx.array]) -> Kinds:
    return tuple((x.dtype, x.ndim == 0, x.size < 8) for x in inputs)


def generated(
    source: Source, inputs: Kinds, outputs: tuple[mx.Dtype, ...], spelling: str
) -> tuple[str, tuple[Parameter, ...]]:
    """A kernel's source, and its parameters."""
    return (_metal if spelling == "metal" else _cuda)(source, inputs, outputs)


@cache
def _metal(source: Source, kinds: Kinds, outputs: tuple[mx.Dtype, ...]) -> tuple[str, tuple[Parameter, ...]]:
    kernel = make_kernel(source, "metal")
    inputs = [mx.zeros(() if scalar else (1 if small else 8,), dtype) for dtype, scalar, small in kinds]

    def launch(x: mx.array) -> list[mx.array]:
        return kernel(
            inputs=inputs,
            output_shapes=[(8,)] * len(outputs),
            output_dtypes=list(outputs),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            verbose=True,
        )

    text = _printed_while_exported(launch).split("```\n")[1].split("\n```")[0]
    signature = text.split("[[kernel]] void ")[1].split(") {")[0]
    found = re.findall(r"^  (\S.*[*& ]) ?(\w+) \[\[", signature, flags=re.M)
    return text, tuple(Parameter(kind.strip(), name) for kind, name in found)


def _printed_while_exported(launch: Callable[[mx.array], list[mx.array]]) -> str:
    """What MLX, which is C++, prints while it exports a function."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), launch, mx.zeros(1))
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        printed.seek(0)
        return printed.read()


@cache
def _cuda(source: Source, kinds: Kinds, outputs: tuple[mx.Dtype, ...]) -> tuple[str, tuple[Parameter, ...]]:
    """As MLX's CUDA backend writes it, which cannot be asked without CUDA."""
    parameters = []
    for name, (dtype, _, _) in zip(source.inputs, kinds, strict=True):
        parameters.append(Parameter(f"const {CUDA_TYPES[dtype]}*", name))
        if f"{name}_strides" in source.body:
            parameters.append(Parameter("const __grid_constant__ Strides", f"{name}_strides"))
    parameters += [
        Parameter(f"{CUDA_TYPES[dtype]}*", name) for name, dtype in zip(source.outputs, outputs, strict=True)
    ]
    lines = ",\n".join(f"    {p.type} {p.name}" for p in parameters)
    name = f"custom_kernel_{source.name}"
    opened, closed = "namespace mlx::core::cu {\n\n", "\n} // namespace mlx::core::cu\n"
    text = f"{source.header}\n{opened}__global__ void {name}(\n{lines}) {{\n{source.body}\n}}\n{closed}"
    return text, tuple(parameters)
