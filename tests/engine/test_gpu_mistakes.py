"""Mistakes planted in the kernels for GPUs are noticed: barriers, bounds, leaves, axes, low parts, scaling, NaN."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from reference import EPSILON, Array, alone, normal, powers64, relative, wide

from distclip.engine import gpu
from distclip.engine.gpu import measuring, source
from engine.emulation import Emulation, emulated, needs_emulation
from engine.emulation.leaves import columns, launched

pytestmark = [alone, needs_emulation]

BARRIER = "BARRIER;"
SOME = "  if (t < gap) " + BARRIER
FLOAT, COMPLEX = mx.float32, mx.complex64
MISTAKES: dict[str, tuple[str, mx.Dtype, str, str]] = {
    "no barrier behind the axes": ("squares", FLOAT, f"strides, shared);\n  {BARRIER}", "strides, shared);"),
    "no barrier before threads are joined": ("squares", FLOAT, f"{BARRIER}\n  join_threads", "join_threads"),
    "no barrier while threads are joined": ("squares", FLOAT, f"      }}\n    {BARRIER}", "      }"),
    "a barrier that threads miss": ("squares", FLOAT, f"      }}\n    {BARRIER}", f"      }}\n{SOME}"),
    "a value too many": ("squares", FLOAT, "if (index < count)", "if (index <= count)"),
    "a value too few": ("largest", FLOAT, "if (index < count)", "if (index + 1 < count)"),
    "the leaf before": ("squares", FLOAT, ">= table[i * ROW", "> table[i * ROW"),
    "another leaf's strides": ("squares", FLOAT, "strides = &leaf_3_strides", "strides = &leaf_2_strides"),
    "another leaf's values": ("squares", FLOAT, "distclip::Value*)leaf_5", "distclip::Value*)leaf_4"),
    "axes by rising stride": ("squares", FLOAT, "&& size > (shared", "&& size < (shared"),
    "axes joined that memory parts": ("squares", FLOAT, "goes_on = shared", "goes_on = d == 1 || shared"),
    "strides of complex values": ("squares", COMPLEX, "step = strides[d] * PARTS", "step = strides[d]"),
    "no low parts from other threads": ("magnitudes", FLOAT, "add(a, b.hi, b.lo)", "add(a, b.hi, 0.0f)"),
    "no low parts of sums": ("magnitudes", FLOAT, "sum.lo + (lost + rest)", "sum.lo + rest"),
    "low parts that are left to grow": ("squares", FLOAT, "settled(sums.usual)", "sums.usual"),
    "no low parts of squares": ("squares", FLOAT, "exact ? 0.0f : fma(x, x, -square)", "0.0f"),
    "subnormals as floats": ("squares", FLOAT, "float(bits) * ENLARGE_SUBNORMAL", "as_type<float>(bits) * ENLARGE"),
    "large values not made smaller": ("squares", FLOAT, "* SHRINK)", ")"),
    "small values not made larger": ("squares", FLOAT, "enlarged(batch.bits[i])", "as_type<float>(batch.bits[i])"),
    "the largest subnormal as a float": ("largest", FLOAT, "sums.largest < USUAL", "false"),
    "smaller for larger": ("largest", FLOAT, "a.hi > b.hi", "a.hi < b.hi"),
    "NaN that is added": ("squares", FLOAT, "batch.bits[i] >= INFINITE ? 0u :", ""),
    "NaN that is infinite": ("squares", FLOAT, "bits[i] > INFINITE", "bits[i] > 0xffffffffu"),
    "infinity that is NaN": ("squares", FLOAT, "bits[i] > INFINITE", "bits[i] >= INFINITE"),
}  # fmt: skip
BUILDS_FAST = ("-O1", "-mfma", "-ffp-contract=off")


def measured_leaves(dtype: mx.Dtype) -> list[mx.array]:
    leaves = [*launched(dtype), normal((37, 41, 43), 1, dtype)[3:30, ::2, 5:40].transpose(1, 2, 0)]
    leaves += [normal((700, 50), 2, dtype)[::-1, 3:20], normal((3000,), 3, dtype, at=1e25)]
    leaves += [normal((3000,), 4, dtype, at=1e-42), mx.array([1.0, np.nan, 2.0] * 20).astype(dtype)]
    leaves += [mx.full((2**16,), value, dtype) for value in (1.1, 0.1, 1 / 3)]  # every rounding goes the same way
    mx.eval(leaves)
    return leaves


def noticed(kind: str, dtype: mx.Dtype, mistake: tuple[str, str] | None) -> list[str]:
    """What the checks see that is wrong."""
    leaves, wrong, text = measured_leaves(dtype), [], source.measuring(kind, dtype, "metal")
    emulation = Emulation(mistake=mistake, flags=BUILDS_FAST, flush=True)
    assert mistake is None or mistake[0] in text.header + text.body
    try:
        first = columns(kind, leaves, emulation)
        wrong += _wrong_values(kind, leaves, first)
        orders = [columns(kind, leaves, replace(emulation, order=order)) for order in (1, 2)]
        wrong += ["orders of threads"] if any(not np.array_equal(first, o, equal_nan=True) for o in orders) else []
        wrong += ["sums that are not finite"] if not np.isfinite(first).all() else []
        matrix = normal((300, 200), 5, dtype)
        bits = [columns(kind, [x], emulation) for x in (matrix, matrix.T, matrix.reshape(-1))]
        wrong += ["a dense leaf"] if any(not np.array_equal(bits[0], other) for other in bits[1:]) else []
    except AssertionError as error:
        wrong.append(str(error).splitlines()[0])
    return wrong


def _wrong_values(kind: str, leaves: list[mx.array], columns: Array) -> list[str]:
    p = {"squares": 2.0, "magnitudes": 1.0, "largest": np.inf}[kind]
    plan = measuring._plan(tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    values = np.array(measuring._by_leaf(kind, mx.array(columns), plan))
    wrong = []
    for i, ((value, count), leaf) in enumerate(zip(values, leaves, strict=True)):
        parts = np.ascontiguousarray(np.array(leaf)).view(np.float32).astype(np.float64)
        truth = powers64(leaf, p) if np.isfinite(parts).all() else np.nan if np.isnan(parts).any() else np.inf
        same = value == truth or (np.isnan(value) and np.isnan(truth)) or relative(value, truth) <= 1e-12
        wrong += [] if same and count == (~np.isfinite(parts)).sum() else [f"the value of leaf {i}"]
    return wrong


@pytest.mark.parametrize(
    ("kind", "dtype"), sorted({(kind, d) for kind, d, _, _ in MISTAKES.values()}, key=str), ids=str
)
def test_checks_see_no_mistake_where_none_is(kind: str, dtype: mx.Dtype) -> None:
    assert noticed(kind, dtype, None) == []


@pytest.mark.parametrize(("kind", "dtype", "right", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_a_planted_mistake_is_noticed(kind: str, dtype: mx.Dtype, right: str, wrong: str) -> None:
    assert noticed(kind, dtype, (right, wrong)) != []


SCALED: dict[str, tuple[mx.Dtype, str, str]] = {
    "another leaf's factor": (FLOAT, "factors[row[FACTOR]]", "factors[0]"),
    "products that are not finite": (FLOAT, "finite ? Value", "true ? Value"),
    "a value too few": (FLOAT, "i < size &&", "i + 1 < size &&"),
    "strides left out": (FLOAT, "x[place_of(i, row, strides)]", "x[i]"),
    "another leaf's values": (FLOAT, "distclip::Value*)leaf_2", "distclip::Value*)leaf_1"),
    "no imaginary parts": (COMPLEX, "place = index % PARTS", "place = 0"),
    "rounded twice": (
        mx.bfloat16,
        "float(x[place_of(i, row, strides)]) * factor",
        "float(Value(factor)) * float(x[i])",
    ),
}


def scaled_wrongly(dtype: mx.Dtype, mistake: tuple[str, str] | None) -> bool:
    leaves = [normal(shape, i, dtype) for i, shape in enumerate([(64,), (40, 50), (90, 30), (3,), (5, 6, 7), (2049,)])]
    leaves += [leaves[1].T, leaves[2][::-2, 3:20], leaves[4].transpose(2, 0, 1), leaves[3]]
    factors = mx.linspace(-1.1, 2.3, len(leaves))
    with emulated(Emulation(mistake=mistake, flags=BUILDS_FAST)):
        scaled = gpu.scale(leaves, factors) + gpu.scale(leaves, mx.array(np.nan), mx.array(False))
    expected = [wide(x) * f for x, f in zip(leaves, np.array(factors), strict=True)] + [0 * wide(x) for x in leaves]
    return any(not same(y, truth) for y, truth in zip(scaled, expected, strict=True))


def same(scaled: mx.array, truth: Array) -> bool:
    return np.allclose(wide(scaled), truth, rtol=EPSILON[scaled.dtype] / 2 * 1.001, atol=0)


@pytest.mark.parametrize("dtype", sorted({d for d, _, _ in SCALED.values()}, key=str), ids=str)
def test_checks_see_no_mistake_where_leaves_are_scaled_rightly(dtype: mx.Dtype) -> None:
    assert not scaled_wrongly(dtype, None)


@pytest.mark.parametrize(("dtype", "right", "wrong"), SCALED.values(), ids=SCALED)
def test_a_mistake_planted_in_the_scaling_is_noticed(dtype: mx.Dtype, right: str, wrong: str) -> None:
    text = source.scaling(dtype, "metal")
    assert right in text.header + text.body
    assert scaled_wrongly(dtype, (right, wrong))
