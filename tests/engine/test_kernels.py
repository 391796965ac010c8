"""The two local passes against float64 NumPy. They know no ranks, so once, alone, is enough."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import (
    DTYPES,
    EPSILON,
    NORM_ERROR,
    SUM_ERROR,
    Array,
    alone,
    assert_close,
    norm64,
    normal,
    powers64,
    relative,
    wide,
)

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
    "around the least block": [(2**15 - 1,), (2**15,), (2**15 + 1,), (2**16 + 3,)],
    "around a block": [(2**18 - 1,), (2**18,), (2**18 + 1,)],
    "around a small leaf": [(2**14 - 1,), (2**14,), (2**14 + 1,), (127, 129), (128, 128)],
    "several blocks": [(2**19 + 5,), (1100, 700), (700, 1100), (9, 2**16)],
    "32 blocks": [(2050, 1100)],
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
    measured = kernels.sum_squares(leaves)
    assert (measured.dtype, measured.shape) == (mx.float64, (len(leaves), 2))
    assert_by_leaf(measured, leaves, 2.0, 1e-13 if dtype == mx.float64 else NORM_ERROR)
    assert relative(math.sqrt(together(measured)), norm64(leaves)) <= (1e-13 if dtype == mx.float64 else NORM_ERROR)


def rows(measured: mx.array) -> Array:
    return np.array(measured).reshape(-1, 2)


def together(measured: mx.array) -> float:
    """The sum over all leaves, every value of which is finite."""
    assert not rows(measured)[:, 1].any()
    return math.fsum(rows(measured)[:, 0])


def assert_by_leaf(measured: mx.array, leaves: list[mx.array], p: float, error: float) -> None:
    """Each leaf's own norm is right, and no value of it is counted as not finite."""
    for (value, nonfinite), leaf in zip(rows(measured).tolist(), leaves, strict=True):
        assert nonfinite == 0
        assert relative(value if math.isinf(p) else value ** (1 / p), norm64(leaf, p)) <= error


@pytest.mark.parametrize("p", [1.0, 3.0, 2.5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["0-d", "no leaf", "empty leaves", "matrices", "3-D and 4-D", "a model"])
def test_sum_powers_is_the_float64_sum(name: str, dtype: mx.Dtype, p: float) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(SHAPES[name])]
    sums = power_sums(leaves, p)
    for value, leaf in zip(sums.tolist(), leaves, strict=True):
        assert relative(value ** (1 / p), norm64(leaf, p)) <= SUM_ERROR
    assert relative(math.fsum(sums) ** (1 / p), norm64(leaves, p)) <= SUM_ERROR


def unit_of(leaves: list[mx.array]) -> mx.array:
    largest = powers64(leaves, math.inf)
    return mx.array(2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0, mx.float64)


def power_sums(leaves: list[mx.array], p: float) -> Array:
    """The sums of powers of finite leaves."""
    if p == 1:
        measured = rows(kernels.sum_abs(leaves))
        assert not measured[:, 1].any()
        return np.asarray(measured[:, 0])
    unit = unit_of(leaves)
    sums = kernels.sum_powers(leaves, p, unit)
    assert (sums.dtype, sums.shape) == (mx.float64, (len(leaves),))
    return np.asarray(np.array(sums) * float(unit) ** p)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_max_abs_is_the_largest_magnitude(shapes: Shapes, dtype: mx.Dtype) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    measured = kernels.max_abs(leaves)
    assert (measured.dtype, measured.shape) == (mx.float64, (len(leaves), 2))
    assert_by_leaf(measured, leaves, math.inf, 1e-7 if dtype == mx.complex64 else 0)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int16, mx.int32, mx.uint8, mx.uint32])
def test_the_extremes_of_an_integer_type_count_in_full(dtype: mx.Dtype) -> None:
    numpy_type = np.dtype(str(dtype).removeprefix("mlx.core."))
    leaf = mx.array(np.array([np.iinfo(numpy_type).min, 0, 1], numpy_type))
    truth = float(max(-int(np.iinfo(numpy_type).min), 1))
    assert together(kernels.max_abs([leaf])) == truth
    assert relative(together(kernels.sum_abs([leaf])), powers64([leaf], 1.0)) <= NORM_ERROR
    assert relative(together(kernels.sum_squares([leaf])), powers64([leaf])) <= NORM_ERROR


@pytest.mark.parametrize("at", [1e-15, 1e15])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_magnitudes_far_from_one_keep_their_digits(p: float, at: float) -> None:
    leaves = [normal((300, 300), 1, at=at), normal((9,), 2, at=at)]
    error = NORM_ERROR if p in (1, 2, math.inf) else SUM_ERROR
    if p in (2, math.inf):
        assert_by_leaf((kernels.sum_squares if p == 2 else kernels.max_abs)(leaves), leaves, p, error)
    else:
        for value, leaf in zip(power_sums(leaves, p), leaves, strict=True):
            assert relative(value ** (1 / p), norm64(leaf, p)) <= error


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1, 0.7, 1e-3])
@pytest.mark.parametrize("shape", [(2**20,), (2**20 + 7,), (1024, 1024), (3, 700, 500), (33, 2**15)], ids=str)
def test_equal_values_do_not_drift(shape: tuple[int, ...], value: float) -> None:
    """Equal values are the worst case of a running sum: every rounding goes the same way."""
    leaf = mx.full(shape, value)
    for measured, p in ((kernels.sum_squares([leaf]), 2), (kernels.sum_abs([leaf]), 1)):
        truth = leaf.size * float(np.float32(value)) ** p
        assert relative(together(measured), truth) <= NORM_ERROR * p


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
    assert relative(math.sqrt(together(kernels.sum_squares([leaf]))), math.sqrt(truth)) <= NORM_ERROR


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
    assert relative(math.sqrt(together(kernels.sum_squares([leaf]))), norm64(leaf)) <= NORM_ERROR
    assert relative(together(kernels.sum_abs([leaf])), powers64(leaf, 1.0)) <= NORM_ERROR
    assert together(kernels.max_abs([leaf])) == powers64(leaf, math.inf)


def test_leaves_of_many_types_and_sizes_have_sums_of_their_own() -> None:
    shapes: Shapes = [(5,), (0,), (50, 60), (), (300, 200), (3, 0)]
    leaves = [normal(shape, i, dtype) for i, dtype in enumerate(DTYPES.values()) for shape in shapes] * 2
    assert_by_leaf(kernels.sum_squares(leaves), leaves, 2.0, NORM_ERROR)
    assert_by_leaf(kernels.sum_abs(leaves), leaves, 1.0, NORM_ERROR)
    assert_by_leaf(kernels.max_abs(leaves), leaves, math.inf, 1e-7)


@pytest.mark.parametrize("shape", [(5,), (3000,), (70_000,), (513, 1025)], ids=str)
def test_a_value_that_is_not_finite_counts_in_its_leaf_alone(shape: tuple[int, ...]) -> None:
    leaves = [normal(shape, seed) for seed in range(5)] + [normal((9,), 1)]
    leaves[3] = mx.where(mx.arange(leaves[3].size).reshape(shape) == 4, math.nan, leaves[3])
    for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
        measured = rows(measure(leaves))
        assert np.isnan(measured[:, 0]).tolist() == [i == 3 for i in range(6)]
        assert measured[:, 1].tolist() == [float(i == 3) for i in range(6)]
    sums = np.array(kernels.sum_powers(leaves, 3.0, mx.array(8.0, mx.float64)))
    assert np.isnan(sums).tolist() == [i == 3 for i in range(6)]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_the_sum_of_each_leaf_has_its_own_gradient(compiled: bool) -> None:
    shapes: Shapes = [(5,), (), (3000,), (3000,), (70_001,), (513, 1025), (1025, 700), (3, 200, 201)]
    leaves = [normal(shape, seed) for seed, shape in enumerate(shapes)]
    weights = mx.arange(1, len(shapes) + 1).astype(mx.float64, stream=mx.cpu)

    def weighted(leaves: list[mx.array]) -> mx.array:
        return mx.sum(mx.multiply(weights, kernels.sum_squares(leaves)[:, 0], stream=mx.cpu), stream=mx.cpu)

    slopes: Any = mx.compile(mx.grad(weighted)) if compiled else mx.grad(weighted)
    for i, (slope, leaf) in enumerate(zip(slopes(leaves), leaves, strict=True)):
        assert_close(slope, 2 * (i + 1) * wide(leaf), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2**18,), (512, 512), (250_007,), (4096,)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_measuring_takes_little_memory(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    leaves = [normal(shape, 1, dtype) + i for i in range(2**24 // math.prod(shape))]
    mx.eval(leaves)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(kernels.sum_squares(leaves))
    assert mx.get_peak_memory() - before < 3 * 2**24  # float32 copies of all leaves would take 2**26


@pytest.mark.parametrize("size", [1, 100, 5000, 70_000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.complex64, mx.float64])
def test_one_bad_value_is_counted_wherever_it_stands(dtype: mx.Dtype, value: float, size: int) -> None:
    for place in {0, size // 3, size // 2, size - 1}:
        host = np.ones(size, np.float32)
        host[place] = value
        leaves = [mx.ones((40,)), mx.array(host).astype(dtype, stream=mx.cpu)]
        for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
            (_, none), (total, bad) = rows(measure(leaves)).tolist()
            assert (math.isfinite(total), none, bad > 0) == (False, 0, True)
        assert np.isfinite(np.array(kernels.sum_powers(leaves, 3.0, unit_of(leaves)))).tolist() == [True, False]


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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_each_leaf_may_have_a_factor_of_its_own(dtype: mx.Dtype) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate([(), (0,), (7,), (30, 40), (70_000,), (2, 3, 4)])]
    whole = mx.array([9.0, 0.3, 9.0, 1.0, 9.0, -2.0, 9.0, 0.0, 9.0, 0.7, 9.0, 1e-3, 9.0])
    for factor in (mx.array(np.array(whole)[1::2]), whole[1::2], whole[-2::-2][::-1], mx.broadcast_to(whole[1], (6,))):
        scaled = kernels.scale(leaves, factor)
        for before, after, f in zip(leaves, scaled, factor.tolist(), strict=True):  # type: ignore[arg-type]
            assert after.shape == before.shape
            assert after.dtype == (before.dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32)
            assert_close(after, wide(before) * f, rtol=2 * EPSILON[after.dtype])
        for zeros in kernels.scale(leaves, factor, mx.array(False)):
            assert not wide(zeros).any()


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)], ids=str)
def test_a_factor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="factor"):
        kernels.scale([mx.ones(4)] * 3, mx.ones(shape))


def test_factors_of_leaves_are_differentiated_and_compiled() -> None:
    leaves = [normal((4,), 1), normal((), 2), normal((30, 2), 3)]
    factor = mx.array([0.5, 2.0, -1.0])

    def total(factor: mx.array, *leaves: mx.array) -> mx.array:
        return sum((x.sum() for x in kernels.scale(list(leaves), factor)), start=mx.array(0.0))

    for f in (mx.grad(total, argnums=(0, 1, 2, 3)), mx.compile(mx.grad(total, argnums=(0, 1, 2, 3)))):
        of_factor, *of_leaves = f(factor, *leaves)
        assert_close(of_factor, np.array([wide(x).sum() for x in leaves]), rtol=1e-6)
        for x, value in zip(of_leaves, [0.5, 2.0, -1.0], strict=True):
            assert_close(x, np.full(x.shape, value))
    mapped = mx.vmap(lambda f: kernels.scale(leaves, f)[2])(mx.stack([factor, 3 * factor]))
    assert_close(mapped, np.stack([-wide(leaves[2]), -3 * wide(leaves[2])]))
    direction = mx.jvp(lambda f: kernels.scale(leaves, f)[0], [factor], [mx.array([3.0, 5.0, 7.0])])[1][0]
    assert_close(direction, 3 * wide(leaves[0]))
    twice = mx.compile(lambda f, x: kernels.scale([x, x], f))  # the same leaf, which the factor alone distinguishes
    for x, value in zip(twice(factor[:2], leaves[0]), [0.5, 2.0], strict=True):
        assert_close(x, value * wide(leaves[0]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("condition", [True, False])
def test_select_returns_the_updated_or_the_old_arrays(condition: bool, dtype: mx.Dtype) -> None:
    shapes: Shapes = [(), (0,), (7,), (300, 400)]
    updated = [normal(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    old = [normal(shape, 9 + seed, dtype) for seed, shape in enumerate(shapes)]
    selected = kernels.select(mx.array(condition), updated, old)
    for x, expected in zip(selected, updated if condition else old, strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(wide(x), wide(expected))


def test_scale_multiplies_before_it_rounds_to_half() -> None:
    scaled = kernels.scale([mx.full((8,), 6e4, mx.float16)], mx.array(1e-7))[0]
    assert_close(scaled, np.full(8, 6e4 * float(np.float32(1e-7))))


@alone
@pytest.mark.skipif(kernels.native_kernel(mx.cpu) is None, reason="nothing tells without the native kernel")
def test_an_array_that_was_updated_in_place_has_changed() -> None:
    arrays = [mx.ones((1 << 20,)) * 2, mx.ones(3), mx.ones((2, 2)), mx.ones(())]
    before = [x.__copy__() for x in arrays]
    assert kernels.changed(arrays, before) == [False] * 4
    arrays[1] += 1
    arrays[2] = arrays[2] * 1
    assert kernels.changed(arrays, before) == [False, True, True, False]
    assert before[1].tolist() == [1, 1, 1]
    mx.eval(arrays)
    assert kernels.changed(arrays, before) == [False, True, True, False]
