"""The kernels for GPUs, emulated: what they measure and scale against float64, and how many launches a tree takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from reference import DTYPES, FLOATS, Array, alone, assert_close, normal, powers64, relative, wide

from distclip.bench.trees import qwen
from distclip.engine import gpu, native, operations
from engine.emulation import Emulation, emulated, needs_emulation

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
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_each_leaf_is_measured_as_in_float64(dtype: mx.Dtype, measure: Any, p: float) -> None:
    leaves = [normal(shape, seed, dtype) for seed, shape in enumerate(SHAPES)]
    assert_by_leaf(measure(leaves), leaves, p, 1e-7 if dtype == mx.complex64 and p != 2 else SUM_ERROR)


@every_measure
def test_leaves_of_all_types_and_layouts_together_are_as_by_the_native_kernel(measure: Any, p: float) -> None:
    leaves = [normal(shape, i, dtype) for i, dtype in enumerate(DTYPES.values()) for shape in [*SHAPES, (2,) * 10]]
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
@pytest.mark.parametrize("dtype", [*FLOATS.values(), mx.complex64, mx.float64], ids=[*FLOATS, "complex64", "float64"])
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
        assert_close(slope, wide(truth), rtol=1e-6 if dtype in (mx.float32, mx.float64) else None)
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
    for leaves in (every, every[:3], [every[0], mx.array([2.0], mx.float64), every[9]]):
        n = len(leaves)
        plain = mx.linspace(-2, 3, n)
        for factor in (plain, mx.repeat(plain, 2)[::2], plain[::-1], mx.broadcast_to(plain[:1], (n,))):
            assert_same_bits(gpu.scale(leaves, factor), kernel.scale(leaves, factor, None, mx.cpu))


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="factor"):
        gpu.scale([mx.ones(4)] * 3, mx.ones((2,)))


def test_no_leaf_is_scaled_to_no_leaf() -> None:
    assert gpu.scale([], mx.array(2.0)) == []


# ------------------------------------------------------------------------------------------------- load and problem


def test_the_kernels_are_given_out_where_they_work(emulation: Emulation) -> None:
    assert gpu.problem() == ""
    assert gpu.load() is gpu
    launches = len(emulation.launches)
    assert gpu.load() is gpu
    assert len(emulation.launches) == launches  # verified once


def test_without_a_gpu_there_are_no_kernels_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.source, "backend", lambda: "")
    assert gpu.load() is None
    assert gpu.problem() == "MLX has neither Metal nor CUDA here"


def test_the_environment_forbids_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", "mlx")
    assert gpu.load() is None
    assert "DISTCLIP_ENGINE=mlx" in gpu.problem()


FAULTS = {
    "does not compile": (("distclip::measure(", "distclip::gauge("), "cannot run: .*gauge"),
    "sums wrongly": (("sum.lo + (lost + rest)", "sum.lo + rest"), "measure squares of float32 .* as .*, not as"),
    "scales wrongly": (("* factor)", "+ factor)"), "scale float32 of shape .* wrongly: .* times 0.375 is"),
}


@pytest.mark.parametrize(("mistake", "problem"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("wanted", ["", "gpu"])
def test_kernels_that_do_not_work_are_not_given_out(
    mistake: tuple[str, str], problem: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", wanted)
    with emulated(Emulation(mistake=mistake)):
        assert re.search(problem, gpu.problem())
        if wanted:
            with pytest.raises(ImportError, match=f"DISTCLIP_ENGINE=gpu, but distclip's kernels for Metal {problem}"):
                gpu.load()
            return
        with pytest.warns(RuntimeWarning, match=f"kernels for Metal {problem}.* MLX operations .* report .*mlx 0"):
            assert gpu.load() is None
        assert gpu.load() is None  # warns once


def test_where_kernels_are_demanded_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLIP_ENGINE", "gpu")
    monkeypatch.setattr(gpu.source, "backend", lambda: "")
    with pytest.raises(ImportError, match="DISTCLIP_ENGINE=gpu, but MLX has neither Metal nor CUDA here"):
        gpu.load()


def test_the_kernels_are_verified_inside_a_trace() -> None:
    def double(x: mx.array) -> mx.array:
        gpu.load.cache_clear()
        gpu.problem.cache_clear()
        assert gpu.load() is gpu
        return 2 * x

    assert mx.compile(double)(mx.array(2.0)).item() == 4.0
    assert mx.grad(double)(mx.array(2.0)).item() == 2.0


# --------------------------------------------------------------------------------------------------------- counted

TREES: dict[str, tuple[Shapes, mx.Dtype, int, float]] = {  # launches, and bytes for each value
    "Qwen2.5-0.5B": (qwen(), mx.bfloat16, 21, 2.1),
    "256 x 250,000": ([(250_000,)] * 256, mx.float32, 19, 4.1),
    "2,000 x 64": ([(64,)] * 2000, mx.float32, 143, 7.0),
}


@dataclass
class Recorder:
    """Counts launches, and the bytes of what the GPU reads and writes in them and to join what they give."""

    launches: int = 0
    read: int = 0
    written: int = 0

    def kernel(self, _: Any) -> Callable[..., list[mx.array]]:
        def launch(*, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            self.launches += 1
            different = {id(x): x.nbytes for x in inputs}
            self.read += sum(different.values())
            self.written += sum(math.prod(s) * d.size for s, d in zip(output_shapes, output_dtypes, strict=True))
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch


@every_measure
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_is_read_once_in_few_launches(
    tree: tuple[Shapes, mx.Dtype, int, float], measure: Any, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, dtype, launches, bytes_per_value = tree
    recorder, joined = Recorder(), []
    concatenate = mx.concatenate

    def spy(arrays: list[mx.array], *args: Any, **more: Any) -> mx.array:
        joined.extend([len(arrays)] if arrays[0].dtype == mx.float32 else [])
        return concatenate(arrays, *args, **more)

    monkeypatch.setattr(mx, "concatenate", spy)
    monkeypatch.setattr(gpu.source, "kernel", recorder.kernel)
    measure([mx.zeros(shape, dtype) for shape in shapes])  # never evaluated
    assert recorder.launches == launches
    join = 2 * recorder.written  # to read and write it again
    assert recorder.read + recorder.written + join <= bytes_per_value * sum(map(math.prod, shapes))
    assert joined == [launches]  # one array goes to the CPU


def test_many_small_leaves_are_scaled_in_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(gpu.source, "kernel", recorder.kernel)
    scaled = gpu.scale([mx.zeros((64,))] * 2000, mx.array(0.5), mx.array(True))
    assert (len(scaled), recorder.launches) == (2000, 223)
