"""The text of the kernels for GPUs: the same bits however threads run, compilers, and planted mistakes."""

from __future__ import annotations

import ctypes
import io
import mmap
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import FLOATS, Array, alone, normal, powers64, relative

from distclip.engine import gpu
from distclip.engine.gpu import measuring, source
from engine.emulation import Emulation, compilers, emulated, needs_emulation
from engine.emulation.generated import generated
from engine.emulation.leaves import SHAPES, columns, launched

pytestmark = [alone, needs_emulation]

TYPES = {**FLOATS, "complex64": mx.complex64}
every_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
CONTRACT = ("-O3", "-march=native", "-ffp-contract=fast")
SAME = {
    "threads in falling order": Emulation(order=1),
    "threads in random orders": Emulation(order=2),
    "threads in other random orders": Emulation(order=12345),
    "products fused where a compiler may": Emulation(flags=CONTRACT),
    "CUDA's words": Emulation(spelling="cuda"),
}


@every_type
@pytest.mark.parametrize("kind", source.KINDS)
@pytest.mark.parametrize("emulation", SAME.values(), ids=SAME)
def test_the_bits_depend_on_nothing_but_the_values(emulation: Emulation, kind: str, dtype: mx.Dtype) -> None:
    leaves = launched(dtype)
    np.testing.assert_array_equal(columns(kind, leaves, emulation), columns(kind, leaves, Emulation()))


@every_type
def test_a_transposed_leaf_is_read_as_it_lies_in_memory(dtype: mx.Dtype) -> None:
    leaf = normal((300, 200), 1, dtype)
    for kind in source.KINDS:
        np.testing.assert_array_equal(columns(kind, [leaf.T], Emulation()), columns(kind, [leaf], Emulation()))


@every_type
def test_cuda_scales_to_the_same_bits(dtype: mx.Dtype) -> None:
    leaves = [normal(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    scaled = []
    for spelling in ("metal", "cuda"):
        with emulated(Emulation(spelling=spelling)):
            scaled.append(gpu.scale(leaves, mx.array(0.3), mx.array(True)))
    for x, y in zip(*scaled, strict=True):
        assert mx.array_equal(x.view(mx.uint8), y.view(mx.uint8))


# ------------------------------------------------------------------------------------------------------- compilers


def every_source(spelling: str) -> list[tuple[source.Source, mx.Dtype]]:
    measured = [(source.measuring(kind, dtype, spelling), dtype) for kind in source.KINDS for dtype in TYPES.values()]
    return measured + [(source.scaling(dtype, spelling), dtype) for dtype in TYPES.values()]


def test_clang_takes_the_kernels_with_address_spaces() -> None:
    pytest.importorskip("clang.cindex", reason="libclang is not installed: address spaces are not checked")
    for text, dtype in every_source("metal"):
        assert compilers.clang_errors(text, dtype) == []


REFUSED = {
    "shared memory for a thread's own": ("SHARED float* columns;", "float* columns;"),
    "constant memory for a device's": ("const CONSTANT int64_t* strides,", "const DEVICE int64_t* strides,"),
    "a device's memory for constant memory": ("const DEVICE int64_t* row,", "const CONSTANT int64_t* row,"),
    "a name that is not there": ("largest_of(batch)", "biggest_of(batch)"),
    "a missing semicolon": ("float hi, lo;", "float hi, lo"),
}


@pytest.mark.parametrize("mistake", REFUSED.values(), ids=REFUSED)
def test_clang_refuses(mistake: tuple[str, str]) -> None:
    pytest.importorskip("clang.cindex", reason="libclang is not installed: address spaces are not checked")
    assert compilers.clang_errors(source.measuring("squares", mx.float32, "metal"), mx.float32, mistake) != []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: CUDA's compiler has not seen the kernels")
def test_nvcc_takes_the_kernels_and_spills_no_register(tmp_path: Path) -> None:
    some = [("squares", mx.float32), ("magnitudes", mx.bfloat16), ("largest", mx.float16), ("squares", mx.complex64)]
    sources = [(source.measuring(kind, dtype, "cuda"), dtype) for kind, dtype in some]
    sources += [(source.scaling(dtype, "cuda"), dtype) for dtype in (mx.bfloat16, mx.complex64)]
    report = compilers.nvcc_reports(sources, tmp_path)
    assert report.count("0 bytes spill stores, 0 bytes spill loads") == len(sources)


@every_type
def test_metal_has_buffers_enough(dtype: mx.Dtype) -> None:
    for text, of in every_source("metal"):
        written, parameters = generated(text, compilers.inputs_of(text, of), (of,) * len(text.outputs), "metal")
        assert written.count("[[buffer(") == len([p for p in parameters if p.is_array]) == 30  # of 31


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_mlx_records_a_launch_as_a_node(compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an evaluation, which would fail: MLX's own kernels are recorded here, for a GPU that is not there."""
    monkeypatch.setattr(source, "backend", lambda: "metal")
    leaves = [normal((5, 7), i, dtype) for i in range(10) for dtype in TYPES.values()] + [mx.zeros((0,)), mx.zeros(3)]
    graph = io.StringIO()

    def step(factor: mx.array, *leaves: mx.array) -> list[mx.array]:
        measured = gpu.sum_squares(list(leaves))
        result = [measured, *gpu.scale(list(leaves), factor, measured[0, 1] == 0)]
        mx.export_to_dot(graph, *result)
        return result

    traced: Any = mx.compile(step) if compiled else step
    with pytest.raises(ValueError, match="Unable to serialize primitive CustomTransforms"):  # when all is traced
        mx.export_function(str(tmp_path / "step.mlxfn"), traced, mx.array(0.5), *leaves)
    assert graph.getvalue().count('"CustomKernel"') == 4 + 4 * 2


# ---------------------------------------------------------------------------------------------------------- memory


@every_type
def test_memory_beyond_the_ends_of_a_leaf_is_never_read(dtype: mx.Dtype) -> None:
    emulation, text = Emulation(), source.measuring("squares", dtype, "metal")
    for size in (8, 31, 1023, 2047, 2048, 65_535, 65_536, 66_000):
        values = np.array(normal((size,), size, dtype).view(mx.uint8))
        plan = measuring._plan((((size,), dtype),))
        with between_unreadable_pages(values.nbytes) as places:
            for place in places:
                place[:] = values
                leaf = place.view(np.uint16 if dtype.size == 2 else np.float32 if dtype.size == 4 else np.complex64)
                made = np.zeros((plan.leaf_of.size, source.COLUMNS), np.float32)
                arrays = [leaf] * source.MEASURE.leaves + [np.array(plan.launches[0].table), made]
                emulation.run(text, compilers.inputs_of(text, dtype), (mx.float32,), arrays, len(made))
                total = np.array(measuring._by_leaf("squares", mx.array(made), plan))[0, 0]
                assert relative(total, powers64(normal((size,), size, dtype))) <= 1e-12


@contextmanager
def between_unreadable_pages(size: int) -> Iterator[tuple[Array, Array]]:
    """Memory of this many bytes that begins behind a page that cannot be read, and memory that ends before another."""
    page = mmap.PAGESIZE
    whole = -(-size // page) * page
    every = np.frombuffer(mmap.mmap(-1, whole + 2 * page), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)

    def protect(rights: int) -> None:
        for guard in (every.ctypes.data, every.ctypes.data + page + whole):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), rights) == 0

    protect(0)
    try:
        yield every[page : page + size], every[page + whole - size : page + whole]
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)
