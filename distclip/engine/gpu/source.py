"""The source of the GPU's kernels, as MLX takes it: constants, the header files of this folder, and a body.

One text serves Metal and CUDA. MLX writes the kernel's signature, from the names of the arrays and the body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

THREADS = 256  # in a threadgroup
BATCH = 8  # values that a thread loads before it adds
AXES = 8  # leaves with more are made flat first
COLUMNS = 8  # of what measure.h writes
# A leaf's row in the table: AXES lengths from LENGTHS on, and then, to scale it, the number of its factor.
FIELDS = {"FIRST_GROUP": 0, "SIZE": 1, "NDIM": 2, "LENGTHS": 3, "FACTOR": 3 + AXES}


@dataclass(frozen=True)
class Grouping:
    """How many leaves share a launch, values a threadgroup takes, and numbers a leaf has in the table."""

    leaves: int
    chunk: int
    row: int


# Metal takes 31 buffers. A leaf that is measured needs two, its values and strides; one that is scaled a third.
MEASURE = Grouping(leaves=14, chunk=1 << 16, row=3 + AXES)
SCALE = Grouping(leaves=9, chunk=1 << 11, row=4 + AXES)

KINDS = ("squares", "magnitudes", "largest")
VALUES = {mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.complex64: "float"}


@dataclass(frozen=True)
class Source:
    """What MLX needs to make a kernel."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str


def backend() -> str:
    """``"metal"`` or ``"cuda"``, or ``""`` where MLX has neither."""
    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else ""


def device() -> mx.Device:
    """The device that the kernels run on."""
    return mx.Device(mx.gpu, 0)


@cache
def kernel(source: Source) -> Callable[..., list[mx.array]]:
    """The kernel, which MLX compiles when it first runs."""
    return make_kernel(source, backend())


def make_kernel(source: Source, backend: str) -> Callable[..., list[mx.array]]:
    # Fast mathematics would lose the low parts of sums. CUDA's compiler has it off.
    safe = {"compile_options": {"math_mode": "safe"}} if backend == "metal" else {}
    make: Any = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(  # type: ignore[no-any-return]
        name=source.name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        source=source.body,
        header=source.header,
        ensure_row_contiguous=False,
        **safe,
    )


@lru_cache
def measuring(kind: str, dtype: mx.Dtype, backend: str) -> Source:
    """The kernel that measures up to 14 leaves of a dtype.

    Args:
        kind: of :data:`KINDS`.
        dtype: of :data:`VALUES`; complex64 counts as two float32.
        backend: ``"metal"`` or ``"cuda"``.
    """
    constants = {
        **_constants(MEASURE, dtype),
        **{name.upper(): number for number, name in enumerate(KINDS)},
        "MEASURE": kind.upper(),
        "ALL_USUAL": int(dtype == mx.float16),  # no value is too large or too small to be squared in float32
        "BATCH": BATCH,
        "COLUMNS": COLUMNS,
    }
    shared = "__shared__" if backend == "cuda" else "threadgroup"
    return Source(
        name=f"distclip_{kind}_{name_of(dtype)}",
        inputs=(*_numbered("leaf", MEASURE), "table"),
        outputs=("columns",),
        header=_header(constants, "measure.h", backend),
        body=f"""
  {shared} int64_t lengths[AXES + 1];
  {shared} int64_t steps[AXES + 1];
  {shared} int32_t axes[1];
  {shared} float all[COLUMNS * THREADS];
  const distclip::Shared shared = {{lengths, steps, axes, all}};
  const uint32_t t = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;
  const uint32_t leaf = distclip::leaf_of(group, table);
{_selected(MEASURE)}
  distclip::measure(x, strides, table + leaf * ROW, group, t, shared, columns);
""",
    )


@lru_cache
def scaling(dtype: mx.Dtype, backend: str) -> Source:
    """The kernel that scales up to 9 leaves of a dtype, with the arguments of :func:`measuring`."""
    return Source(
        name=f"distclip_scale_{name_of(dtype)}",
        inputs=(*_numbered("leaf", SCALE), "table", "factors", "finite"),
        outputs=_numbered("scaled", SCALE),
        header=_header(_constants(SCALE, dtype), "scale.h", backend),
        body=f"""
  const uint32_t t = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;
  const uint32_t leaf = distclip::leaf_of(group, table);
  const DEVICE int64_t* row = table + leaf * ROW;
{_selected(SCALE, outputs=True)}
  distclip::scale(x, strides, row, group, t, factors[row[FACTOR]], finite[0], y);
""",
    )


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _numbered(name: str, grouping: Grouping) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(grouping.leaves))


def _constants(grouping: Grouping, dtype: mx.Dtype) -> dict[str, str | int]:
    return {
        "VALUE": VALUES[dtype],
        "PARTS": 2 if dtype == mx.complex64 else 1,
        "LEAVES": grouping.leaves,
        "CHUNK": grouping.chunk,
        "THREADS": THREADS,
        "AXES": AXES,
        "ROW": grouping.row,
        **FIELDS,
    }


def _header(constants: dict[str, str | int], file: str, backend: str) -> str:
    defined = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    texts = [(Path(__file__).parent / name).read_text() for name in (f"{backend}.h", "leaves.h", file)]
    return "\n".join([texts[0], defined, *texts[1:]])


def _selected(grouping: Grouping, outputs: bool = False) -> str:
    """The arrays of this threadgroup's leaf: no array of pointers, which Metal would keep in memory."""

    def set_to(i: int, end: str) -> list[str]:
        arrays = [f"x = (const DEVICE distclip::Value*)leaf_{i}{end}", f"strides = &leaf_{i}_strides[0]{end}"]
        return arrays + ([f"y = (DEVICE distclip::Value*)scaled_{i}{end}"] if outputs else [])

    types = ["const DEVICE distclip::Value* ", "const CONSTANT int64_t* ", "DEVICE distclip::Value* "]
    lines = [f"  {declared}{value}" for declared, value in zip(types, set_to(0, ";"), strict=False)]
    for i in range(1, grouping.leaves):
        lines += [f"  if (leaf == {i})", "    " + ", ".join(set_to(i, "")) + ";"]
    return "\n".join(lines)
