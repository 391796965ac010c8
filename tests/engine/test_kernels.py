"""The two local passes against float64 NumPy. They know no ranks, so once, alone, is enough."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import DTYPES, EPSILON, NORM_ERROR, alone, assert_close, norm64, normal, powers64, relative, wide

from distclip.engine import kernels

pytestmark = alone

Shapes = list[tuple[int, ...]]

SHAPES: dict[str, Shapes] = {
    "0-d": [()],
    "one value": [(1,)],
    "no leaf": [],
    "empty leaves": [(0,), (3, 0), (2, 0, 4)],
    "empty leaves among others": [(0,), (5,), (0, 2), (2000,)],
    "around a tiny leaf": [(1023,), (1024,), (1025,)],
    "around the least piece": [(2**15 - 1,), (2**15,), (2**15 + 1,), (2**16 + 3,)],
    "around a piece": [(2**18 - 1,), (2**18,), (2**18 + 1,)],
    "matrices": [(300, 200), (200, 300), (4000, 3), (3, 4000), (1, 5000), (5000, 1)],
    "a large matrix": [(513, 1025)],
    "a long matrix": [(3, 300_000)],
    "3-D and 4-D": [(3, 40, 50), (3, 200, 201), (2, 3, 5, 7), (4, 3, 100, 120), (2, 2, 200, 200), (1, 1, 40_000)],
    "many alike": [(64, 64)] * 70,
    "many large alike": [(200, 200)] * 35,
    "many tiny": [(7,)] * 200 + [()] * 50,
    "a model": [(512, 64), (64,), (64, 256), (256,), (256, 64), (64,), (64, 3, 3, 16)] * 3,
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sum_squares_is_the_float64_sum(shapes: Shapes, dtype: mx.Dtype) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    total, bad = kernels.sum_squares(leaves)
    assert (total.dtype, total.shape, bad.item()) == (mx.float64, (), 0)
    assert relative(mx.sqrt(total, stream=mx.cpu), norm64(leaves)) <= (1e-13 if dtype == mx.float64 else NORM_ERROR)


@pytest.mark.parametrize("p", [1.0, 3.0, 2.5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["0-d", "no leaf", "empty leaves", "matrices", "3-D and 4-D", "a model"])
def test_sum_powers_is_the_float64_sum(name: str, dtype: mx.Dtype, p: float) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(SHAPES[name])]
    total, bad = power_sum(leaves, p)
    assert (total.dtype, total.shape, bad.item()) == (mx.float64, (), 0)
    found: Any = total.item()
    assert relative(found ** (1 / p), norm64(leaves, p)) <= 1e-6


def power_sum(leaves: list[mx.array], p: float) -> tuple[mx.array, mx.array]:
    if p == 1:
        total, bad = kernels.sum_abs(leaves)
        return total, bad
    unit, total, bad = kernels.sum_powers(leaves, p)
    return mx.multiply(total, mx.power(unit, p, stream=mx.cpu), stream=mx.cpu), bad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_max_abs_is_the_largest_magnitude(shapes: Shapes, dtype: mx.Dtype) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    largest, bad = kernels.max_abs(leaves)
    assert (largest.dtype, largest.shape, bad.item()) == (mx.float64, (), 0)
    assert relative(largest, powers64(leaves, math.inf)) <= (1e-7 if dtype == mx.complex64 else 0)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int16, mx.int32, mx.uint8, mx.uint32])
def test_the_extremes_of_an_integer_type_count_in_full(dtype: mx.Dtype) -> None:
    numpy_type = np.dtype(str(dtype).removeprefix("mlx.core."))
    leaf = mx.array(np.array([np.iinfo(numpy_type).min, 0, 1], numpy_type))
    truth = float(max(-int(np.iinfo(numpy_type).min), 1))
    assert kernels.max_abs([leaf])[0].item() == truth
    assert relative(kernels.sum_abs([leaf])[0], powers64([leaf], 1.0)) <= NORM_ERROR
    assert relative(kernels.sum_squares([leaf])[0], powers64([leaf])) <= NORM_ERROR


@pytest.mark.parametrize("at", [1e-15, 1e15])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_magnitudes_far_from_one_keep_their_digits(p: float, at: float) -> None:
    leaves = [normal((300, 300), 1, at=at), normal((9,), 2, at=at)]
    if math.isinf(p):
        total, bad = kernels.max_abs(leaves)
    else:
        total, bad = kernels.sum_squares(leaves) if p == 2 else power_sum(leaves, p)
    assert bad.item() == 0
    found: Any = total.item()
    assert relative(found if math.isinf(p) else found ** (1 / p), norm64(leaves, p)) <= (
        NORM_ERROR if p in (1, 2, math.inf) else 1e-6
    )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1, 0.7, 1e-3])
@pytest.mark.parametrize("shape", [(2**20,), (2**20 + 7,), (1024, 1024), (3, 700, 500), (33, 2**15)], ids=str)
def test_equal_values_do_not_drift(shape: tuple[int, ...], value: float) -> None:
    """Equal values are the worst case of a running sum: every rounding goes the same way."""
    leaf = mx.full(shape, value)
    for total, p in ((kernels.sum_squares([leaf])[0], 2), (kernels.sum_abs([leaf])[0], 1)):
        truth = leaf.size * float(np.float32(value)) ** p
        assert relative(total, truth) <= NORM_ERROR * p


@pytest.mark.parametrize("values", ["normal", "equal"])
def test_one_leaf_of_64_million_values(values: str) -> None:
    size = 64_000_000
    if values == "normal":
        host = np.random.default_rng(0).standard_normal(size, np.float32)
    else:
        host = np.full(size, 0.1, np.float32)
    truth = math.fsum(float(np.dot(part, part)) for part in (c.astype(np.float64) for c in np.split(host, 64)))
    leaf = mx.array(host)
    del host
    total, bad = kernels.sum_squares([leaf])
    assert relative(mx.sqrt(total), math.sqrt(truth)) <= NORM_ERROR
    assert bad.item() == 0


STRIDED = {
    "transposed": lambda x: x.T,
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "reversed": lambda x: x[::-1, ::-1],
    "a corner": lambda x: x[7:-5, 3:-9],
    "broadcast": lambda x: mx.broadcast_to(x[:1], x.shape),
    "3-D, axes moved": lambda x: x.reshape(8, 64, -1).transpose(2, 0, 1),
    "4-D, axes moved": lambda x: x.reshape(4, 16, 8, -1).transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_the_order_in_memory_does_not_matter(view: Any, dtype: mx.Dtype) -> None:
    leaf = view(normal((512, 640), 3, dtype))
    mx.eval(leaf)
    assert relative(mx.sqrt(kernels.sum_squares([leaf])[0]), norm64(leaf)) <= NORM_ERROR
    assert relative(kernels.sum_abs([leaf])[0], powers64(leaf, 1.0)) <= NORM_ERROR
    assert kernels.max_abs([leaf])[0].item() == powers64(leaf, math.inf)


def test_leaves_of_many_types_add_up() -> None:
    leaves = [normal((50, 60), seed, dtype) for seed, dtype in enumerate(DTYPES.values())]
    leaves += [normal((5,), seed, dtype) for seed, dtype in enumerate(DTYPES.values())]
    assert relative(mx.sqrt(kernels.sum_squares(leaves)[0]), norm64(leaves)) <= NORM_ERROR


@pytest.mark.parametrize("size", [1, 100, 5000, 70_000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.complex64, mx.float64])
def test_one_bad_value_is_counted_wherever_it_stands(dtype: mx.Dtype, value: float, size: int) -> None:
    for place in {0, size // 3, size // 2, size - 1}:
        host = np.ones(size, np.float32)
        host[place] = value
        leaves = [mx.ones((40,)), mx.array(host).astype(dtype, stream=mx.cpu)]
        for total, bad in (
            kernels.sum_squares(leaves),
            kernels.sum_abs(leaves),
            kernels.sum_powers(leaves, 3.0)[1:],
        ):
            assert not math.isfinite(total.item())  # type: ignore[arg-type]
            assert bad.item() > 0  # type: ignore[operator]
        largest, bad = kernels.max_abs(leaves)
        assert bad.item() > 0  # type: ignore[operator]
        assert not math.isfinite(largest.item())  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.3, 1.0, 0.0, 1e-9])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_keeps_types_and_shapes(dtype: mx.Dtype, factor: float) -> None:
    leaves = [normal(shape, seed, dtype, at=5.0) for seed, shape in enumerate([(), (0,), (7,), (30, 40), (2, 3, 4)])]
    scaled = kernels.scale(leaves, mx.array(factor))
    for before, after in zip(leaves, scaled, strict=True):
        assert after.shape == before.shape
        assert after.dtype == (before.dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32)
        if dtype != mx.float16 or factor > 1e-3:
            assert_close(after, wide(before) * float(np.float32(factor)), rtol=2 * EPSILON[after.dtype])


def test_scale_multiplies_before_it_rounds_to_half() -> None:
    scaled = kernels.scale([mx.full((8,), 6e4, mx.float16)], mx.array(1e-7))[0]
    assert_close(scaled, np.full(8, 6e4 * float(np.float32(1e-7))))
