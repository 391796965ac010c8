"""The kernels for GPUs, emulated: what they measure and scale, against float64 and the native kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import DTYPES, FLOATS, Array, alone, assert_close, normal, powers64, relative, wide

from distclip.engine import gpu, native, operations
from engine.emulation import Emulation, emulated, needs_emulation

ON_DEVICE = {name: dtype for name, dtype in DTYPES.items() if dtype != mx.float64}

pytestmark = [alone, needs_emulation]

Shapes = list[tuple[int, ...]]
MEASURES: dict[str, tuple[Callable[..., mx.array], float]] = {
    "squares": (gpu.sum_squares, 2.0),
    "magnitudes": (gpu.sum_abs, 1.0),
    "largest": (gpu.max_abs, math.inf),
}
every_measure = pytest.mark.parametrize(("measure", "p"), MEASURES.values(), ids=MEASURES)
SUM_ERROR = 1e-12
SHAPES: Shapes = [(5,), (0,), (50, 60), (), (300, 200), (3, 0), (7, 1), (1,), (65_537,), (2, 3, 5, 7), (8,), (1, 9)]


@pytest.fixture(autouse=True)
def emulation() -> Iterator[Emulation]:
    with emulated() as emulation:
        yield emulation


def rows(measured: mx.array) -> Array:
    assert (measured.dtype, measured.ndim) == (mx.float64, 2)
    return np.array(measured)


def assert_by_leaf(measured: mx.array, leaves: list[mx.array], p: float, error: float = SUM_ERROR) -> None:
    for (value, nonfinite), leaf in zip(rows(measured).tolist(), leaves, strict=True):
        assert nonfinite == 0
        assert relative(value, powers64(leaf, p)) <= error


@every_measure
@pytest.mark.parametrize("dtype", ON_DEVICE.values(), ids=ON_DEVICE)
def test_each_leaf_is_measured_as_in_float64(dtype: mx.Dtype, measure: Any, p: float) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(SHAPES)]
    assert_by_leaf(measure(leaves), leaves, p, 1e-7 if dtype == mx.complex64 and p != 2 else SUM_ERROR)


@every_measure
def test_leaves_of_all_types_and_layouts_together_are_as_by_the_native_kernel(measure: Any, p: float) -> None:
    leaves = [normal(shape, i, dtype) for i, dtype in enumerate(ON_DEVICE.values()) for shape in [*SHAPES, (2,) * 10]]
    leaves = [x.T if i % 3 == 0 else x[::2] if i % 4 == 1 and x.ndim else x for i, x in enumerate(leaves)]
    leaves[4] = mx.where(mx.arange(leaves[4].size).reshape(leaves[4].shape) == 7, mx.inf, leaves[4])
    leaves[20] = leaves[20] + mx.array(math.nan, leaves[20].dtype)
    kernel = native.load()
    expected = getattr(kernel or operations, measure.__name__)(leaves, mx.cpu)
    measured = rows(measure(leaves))
    np.testing.assert_allclose(measured[:, 0], rows(expected)[:, 0], rtol=1e-12 if kernel else 1e-6)
    assert (measured[:, 1] == rows(expected)[:, 1]).all() or not kernel
    assert ((measured[:, 1] > 0) == (rows(expected)[:, 1] > 0)).all()


@every_measure
@pytest.mark.parametrize("leaves", [[], [(0,)], [(3, 0), (0, 2)]], ids=str)
def test_nothing_measures_zero(leaves: Shapes, measure: Any, p: float) -> None:
    assert rows(measure([mx.zeros(shape) for shape in leaves])).tolist() == [[0.0, 0.0]] * len(leaves)


VIEWS: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda x: x.T,
    "every second row": lambda x: x[::2],
    "every second column": lambda x: x[:, ::2],
    "columns, transposed": lambda x: x[:, 100:233].T,
    "reversed": lambda x: x[::-1, ::-1],
    "reversed columns, transposed": lambda x: x[:, ::-1].T,
    "a corner": lambda x: x[7:-5, 3:-9],
    "broadcast": lambda x: mx.broadcast_to(x[:1], x.shape),
    "offset by a value": lambda x: x.reshape(-1)[1:],
    "axes of length 1": lambda x: x[None, :, None, :, None],
    "3-D, axes moved": lambda x: x.reshape(8, 64, -1).transpose(2, 0, 1),
    "3-D, cut, axes moved": lambda x: x.reshape(8, 64, -1)[1:7, ::2, 5:40].transpose(1, 2, 0),
    "8-D, axes moved": lambda x: x.reshape(2, 4, 8, 8, 2, 8, 4, -1).transpose(7, 0, 5, 2, 4, 1, 3, 6),
}


@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_order_in_memory_does_not_matter(view: Any, dtype: mx.Dtype) -> None:
    leaves = [view(normal((512, 320), 3, dtype))]
    mx.eval(leaves)
    assert_by_leaf(gpu.sum_squares(leaves), leaves, 2.0)
    if dtype != mx.complex64:
        assert_by_leaf(gpu.max_abs(leaves), leaves, math.inf)


MAGNITUDES = {mx.float16: [6e-8, 1e-4, 1.0, 1e4]}


@every_measure
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
@pytest.mark.parametrize("flush", [False, True], ids=["", "subnormals flushed"])
def test_magnitudes_far_from_one_keep_their_digits(dtype: mx.Dtype, flush: bool, measure: Any, p: float) -> None:
    if dtype == mx.complex64 and p != 2:
        pytest.skip("MLX makes the magnitudes of complex values")
    with emulated(Emulation(flush=flush)):
        for at in MAGNITUDES.get(dtype, [1e-45, 1e-42, 1e-40, 1e-38, 1e-30, 1e-19, 1e-10, 1e10, 1e19, 1e30, 7e37]):
            leaves = [normal((size,), size, dtype, at=at) for size in (9, 1023, 20_000)]
            mx.eval(leaves)
            assert_by_leaf(measure(leaves), leaves, p)


@every_measure
@pytest.mark.parametrize("value", [1.1, 0.1, 1 / 3, 0.7, 1e-3, 1e-25, 3e30])
def test_equal_values_do_not_drift(value: float, measure: Any, p: float) -> None:
    """Equal values are the worst case of a running sum: every rounding goes the same way."""
    leaves = [mx.full((size,), value) for size in (2**16, 2**16 + 7, 300_000)]
    assert_by_leaf(measure(leaves), leaves, p)


@every_measure
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_magnitudes_that_are_mixed_in_a_leaf_keep_their_digits(dtype: mx.Dtype, measure: Any, p: float) -> None:
    rng = np.random.default_rng(0)
    mixed = np.exp2(rng.uniform(-149, 127.9, 100_000)).astype(np.float32)
    hosts = [mixed, np.sort(mixed), np.sort(mixed)[::-1].copy(), mixed[mixed < 1], mixed[mixed < 1e-15]]
    hosts.append(np.r_[np.full(50_000, 1e-3), 1e15].astype(np.float32))
    leaves = [mx.array(host).astype(dtype) for host in hosts]
    mx.eval(leaves)
    with emulated(Emulation(flush=True)):
        assert_by_leaf(measure(leaves), leaves, p)


@every_measure
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
def test_what_is_not_finite_is_counted_in_its_leaf(dtype: mx.Dtype, measure: Any, p: float) -> None:
    hosts = [np.ones(70_001, np.float32) for _ in range(4)]
    places = np.random.default_rng(1).choice(70_001, 90, replace=False)
    hosts[1][places] = np.tile([np.inf, -np.inf], 45)
    hosts[2][places] = np.tile([np.inf, np.nan, -np.inf], 30)
    measured = rows(measure([mx.array(host).astype(dtype) for host in hosts]))
    assert measured[:, 1].tolist() == [0, 90, 90, 0]
    truth = [70_001.0 if p != math.inf else 1.0, math.inf, math.nan, 70_001.0 if p != math.inf else 1.0]
    np.testing.assert_array_equal(measured[:, 0], truth)


# --------------------------------------------------------------------------------------------------- derivatives


@every_measure
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
def test_the_measure_of_each_leaf_has_its_own_gradient(dtype: mx.Dtype, measure: Any, p: float) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate([(5,), (), (300, 200), (0, 2), (70_001,)])]
    weights = mx.arange(1, len(leaves) + 1).astype(mx.float64, stream=mx.cpu)

    def weighted(measure: Callable[..., mx.array], leaves: list[mx.array]) -> mx.array:
        return mx.sum(mx.multiply(weights, measure(leaves)[:, 0], stream=mx.cpu), stream=mx.cpu)

    by_operations = getattr(operations, measure.__name__)
    expected: Any = mx.grad(lambda leaves: weighted(by_operations, leaves))(leaves)
    slopes: Any = mx.grad(lambda leaves: weighted(measure, leaves))(leaves)
    for slope, truth in zip(slopes, expected, strict=True):
        assert slope.dtype == dtype
        assert_close(slope, wide(truth), rtol=1e-6 if dtype == mx.float32 else None)
    if p == 2 and dtype == mx.float32:
        for i, leaf in enumerate(leaves):
            assert_close(slopes[i], 2 * (i + 1) * wide(leaf), rtol=1e-6)


@every_measure
def test_derivatives_along_a_direction_and_of_many_trees(measure: Any, p: float) -> None:
    leaves = [normal((5,), 1), normal((30, 20), 2), normal((), 3)]
    directions = [normal(leaf.shape, 9 + i) for i, leaf in enumerate(leaves)]
    by_operations = getattr(operations, measure.__name__)

    def along(measure: Callable[..., mx.array]) -> mx.array:
        return mx.jvp(lambda *leaves: measure(list(leaves))[:, 0], leaves, directions)[1][0]

    np.testing.assert_allclose(np.array(along(measure)), np.array(along(by_operations)), rtol=1e-5)
    stacked = [mx.stack([leaf, 2 * leaf, -leaf]) for leaf in leaves]
    np.testing.assert_allclose(
        np.array(mx.vmap(lambda leaves: measure(leaves)[:, 0])(stacked)),
        [[powers64(leaf * k, p) for leaf in leaves] for k in (1, 2, -1)],
        rtol=1e-5,
    )


@every_measure
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
def test_a_compiled_measure_is_that_of_the_leaves_it_gets(dtype: mx.Dtype, measure: Any, p: float) -> None:
    compiled: Any = mx.compile(measure)
    for seed in (1, 2):
        leaves = [normal(shape, seed + i, dtype) for i, shape in enumerate(SHAPES)]
        leaves[4] = mx.where(mx.arange(200) == 7, mx.array([math.inf, math.nan][seed - 1], dtype), leaves[4])
        measured, plain = rows(compiled(leaves)), rows(measure(leaves))
        np.testing.assert_array_equal(measured[:, 1], plain[:, 1])
        np.testing.assert_allclose(measured[:, 0], plain[:, 0], rtol=SUM_ERROR)


# --------------------------------------------------------------------------------------------------------- scale

SMALL: Shapes = [(64,), (3000,), (17, 300), (8,), (5, 6, 7, 8), (2048,), (2049,), (1, 9), (40, 50), (), (3,), (0, 2)]


def small(dtype: mx.Dtype) -> list[mx.array]:
    leaves = [normal(shape, seed, dtype, at=5.0) for seed, shape in enumerate([*SMALL, (2,) * 10])]
    leaves[2], leaves[4], leaves[8] = leaves[2].T, leaves[4].transpose(2, 0, 3, 1), leaves[8][::-3, 5:40]
    return leaves


def assert_same_bits(scaled: list[mx.array], expected: list[mx.array]) -> None:
    for x, y in zip(scaled, expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(wide(x), wide(y))


@pytest.mark.parametrize("finite", [None, True, False])
@pytest.mark.parametrize("factor", [0.37, 1e-4, 1.0, 0.0, -3.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
def test_small_leaves_are_scaled_as_by_the_native_kernel(dtype: mx.Dtype, factor: float, finite: bool | None) -> None:
    kernel = native.load() or pytest.skip("the native kernel was not built")
    leaves, flag = small(dtype), None if finite is None else mx.array(finite)
    assert_same_bits(gpu.scale(leaves, mx.array(factor), flag), kernel.scale(leaves, mx.array(factor), flag, mx.cpu))


@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64], ids=[*FLOATS, "complex64"])
def test_each_small_leaf_may_have_a_factor_of_its_own(dtype: mx.Dtype) -> None:
    kernel = native.load() or pytest.skip("the native kernel was not built")
    every = small(dtype)
    for leaves in (every, every[:3], [every[0], every[9]]):
        n = len(leaves)
        plain = mx.linspace(-2, 3, n)
        for factor in (plain, mx.repeat(plain, 2)[::2], plain[::-1], mx.broadcast_to(plain[:1], (n,))):
            assert_same_bits(gpu.scale(leaves, factor), kernel.scale(leaves, factor, None, mx.cpu))


def test_no_leaf_is_scaled_to_no_leaf() -> None:
    assert gpu.scale([], mx.array(2.0)) == []
