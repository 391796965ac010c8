"""The text of the kernels for GPUs: the same bits however threads run, compilers, and planted mistakes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from reference import FLOATS, Array, alone, normal

from distclip.engine import gpu
from distclip.engine.gpu import measuring, source
from engine.emulation import Emulation, emulated, needs_emulation

pytestmark = [alone, needs_emulation]

TYPES = {**FLOATS, "complex64": mx.complex64}
every_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
SHAPES = [(300, 200), (8,), (70_000,), (1, 9), (64,), (129, 65), (10, 11, 12), (100_000,), (33,), (1023,), (65_536,)]
SHAPES += [(65_537,), (17, 4000), (12,), (3,)]


def launched(dtype: mx.Dtype) -> list[mx.array]:
    """Leaves of two launches, every third transposed, of magnitudes that take all branches, some not finite."""
    at = [1.0] if dtype == mx.float16 else [1e-30, 1e-3, 1.0, 1e3, 1e30, 1e-40]
    leaves = [normal(shape, i, dtype, at=at[i % len(at)]) for i, shape in enumerate(SHAPES)]
    leaves = [x if i % 3 else mx.transpose(x) for i, x in enumerate(leaves)]
    leaves[6] = mx.where(leaves[6] == leaves[6][3, 4, 5], mx.array(np.inf, dtype), leaves[6])
    mx.eval(leaves)
    return leaves


def columns(kind: str, leaves: list[mx.array], emulation: Emulation) -> Array:
    """What the kernel writes, to the bit."""
    with emulated(emulation):
        plan = measuring._plan(tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        return np.array(measuring.columns(kind, leaves, plan, None))


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
