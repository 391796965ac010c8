"""The C++ kernel: sums in float64, products to the last bit, and whose memory it may write into.

It knows no ranks, so once, alone, is enough. The other instruction sets run this file too, see .ci/run.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launching
import mlx.core as mx
import numpy as np
import pytest
from reference import DTYPES, Array, alone, norm64, normal, powers64, relative, wide

import distclip as dc
from distclip.engine import kernels, native
from distclip.engine.native import load, module_name

pytestmark = [alone, pytest.mark.skipif(load() is None, reason="the kernel was not built, or DISTCLIP_ENGINE=mlx")]

HALF = {"float16": mx.float16, "bfloat16": mx.bfloat16}
TYPES = {name: DTYPES[name] for name in ("float32", "float16", "bfloat16", "float64", "complex64")}
every_type = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with mx.stream(mx.cpu):
        yield


def evaluated(shape: tuple[int, ...], seed: int = 1, dtype: mx.Dtype = mx.float32) -> mx.array:
    x = normal(shape, seed, dtype)
    mx.eval(x)
    return x


def parts(x: mx.array) -> Array:
    """The exact values in a row as float64, a complex one as two."""
    return np.ascontiguousarray(wide(x)).reshape(-1).view(np.float64)


def assert_same(x: mx.array, expected: Array) -> None:
    """Equal to the last bit, signs of zeros included; one NaN is as good as another."""
    values = parts(x)
    np.testing.assert_array_equal(values, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(values[number]), np.signbit(expected[number]))


def product(x: mx.array, factor: float) -> Array:
    """The parts of ``x * factor``: NumPy's product in float32 and float64, MLX's in the half types."""
    if x.dtype in HALF.values():
        return parts((x.astype(mx.float32) * mx.array(factor)).astype(x.dtype))
    own: Any = np.float64 if x.dtype == mx.float64 else np.float32
    with np.errstate(all="ignore"):
        scaled = np.ascontiguousarray(x).reshape(-1).view(own) * own(np.float32(factor))
        return np.asarray(scaled, np.float64)


def rows(measured: mx.array) -> list[tuple[float, float]]:
    """A value and a count for each leaf."""
    assert (measured.dtype, measured.ndim) == (mx.float64, 2)
    values: Any = measured.tolist()
    return [(value, count) for value, count in values]


def assert_measured(leaves: list[mx.array]) -> None:
    """All three measures of finite leaves."""
    measures = (kernels.sum_squares, 2.0), (kernels.sum_abs, 1.0), (kernels.max_abs, math.inf)
    for measure, p in measures:
        for (value, bad), leaf in zip(rows(measure(leaves)), leaves, strict=True):
            within = 0.0 if math.isinf(p) else 1e-13
            if leaf.dtype == mx.complex64 and p != 2:
                within = 1e-7  # MLX takes the magnitudes, in float32
            assert (relative(value, powers64(leaf, p)) <= within, bad) == (True, 0)


def assert_scaled(x: mx.array, factor: float) -> None:
    scaled = kernels.scale([x], mx.array(factor))[0]
    assert (scaled.dtype, scaled.shape) == (x.dtype, x.shape)
    assert_same(scaled, product(x, factor))


# ------------------------------------------------------------------------------------------- sizes and strides

AROUND = [n + d for n in (1024, 2**16, 2**17, 2**19) for d in (-1, 0, 1)]


@every_type
@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_every_size_and_every_start_in_memory(start: int, dtype: mx.Dtype) -> None:
    for size in [*range(141), *(AROUND if start < 2 else AROUND[:3])]:
        leaf = normal((start + size,), size, dtype)[start:]  # up to the end of its memory
        assert_measured([leaf])
        assert_scaled(leaf, 0.3)


VIEWS: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda x: x.T,
    "every second row": lambda x: x[::2],
    "every third column": lambda x: x[:, ::3],
    "a reversed axis": lambda x: x[:, ::-1],
    "reversed": lambda x: x[::-1, ::-1],
    "a reversed column": lambda x: x[::-1, 5],
    "a corner": lambda x: x[7:-5, 3:-9],
    "rows of 63": lambda x: x[:, 5:68],
    "rows of 64": lambda x: x[:, 5:69],
    "rows of 1": lambda x: x[:, 9:10],
    "a column": lambda x: x[:, -1],
    "a row": lambda x: x[11],
    "one value": lambda x: x[3, 5],
    "a row for all": lambda x: mx.broadcast_to(x[:1], x.shape),
    "a column for all": lambda x: mx.broadcast_to(x[:, :1], x.shape),
    "one value for all": lambda x: mx.broadcast_to(x[3, 5], (400, 300)),
    "1-D with gaps": lambda x: x.reshape(-1)[3::7],
    "3-D, axes moved": lambda x: x.reshape(8, 64, -1).transpose(2, 0, 1),
    "3-D, a corner": lambda x: x.reshape(8, 64, -1)[1:, 3:60, 2:],
    "4-D, axes moved": lambda x: x.reshape(4, 16, 8, -1).transpose(0, 3, 1, 2),
    "4-D, axes of 1": lambda x: x.reshape(1, 512, 1, -1)[:, ::2],
    "rows that overlap": lambda x: mx.as_strided(x, (900, 80), (100, 1), 5),
    "nothing": lambda x: x[5:5, ::2],
}


@every_type
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_order_in_memory(view: Any, dtype: mx.Dtype) -> None:
    leaf = view(evaluated((512, 200), 3, dtype))
    mx.eval(leaf)
    assert_measured([leaf])
    for factor in (0.3, 1.0):
        assert_scaled(leaf, factor)
    zeros = kernels.scale([leaf], mx.array(math.nan), mx.array(False))[0]
    assert_same(zeros, np.zeros(parts(leaf).size))


@every_type
def test_empty_leaves_add_nothing(dtype: mx.Dtype) -> None:
    empty = [mx.zeros(shape, dtype) for shape in [(0,), (3, 0), (2, 0, 4)]]
    for leaves in ([], empty):
        for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
            measured = measure(leaves)
            assert (measured.shape, rows(measured)) == ((len(leaves), 2), [(0, 0)] * len(leaves))
    assert_measured([*empty, normal((100,), 1, dtype), *empty])
    assert [x.shape for x in kernels.scale(empty, mx.array(0.5))] == [x.shape for x in empty]


def test_leaves_of_all_types_in_one_graph_node() -> None:
    assert_measured([normal((n, 7), n, dtype) for n in (1, 90, 5000) for dtype in TYPES.values()])


# ------------------------------------------------------------------------------------------------------ values


@every_type
@pytest.mark.parametrize("view", ["transposed", "a corner", "a row for all", "rows of 63"])
@pytest.mark.parametrize("bad", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, math.nan)], ids=str)
def test_values_that_are_not_finite_are_counted(bad: tuple[float, ...], view: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(5)
    for many in (1, 1000):
        values = np.ones((300, 700), np.complex64 if dtype == mx.complex64 else np.float32)
        values.reshape(-1)[rng.choice(values.size, many, replace=False)] = np.resize(np.array(bad), many)
        whole = mx.array(values).astype(dtype)
        for leaf in (whole, whole.reshape(-1)[1:], VIEWS[view](whole)):
            host = wide(leaf)
            count = np.count_nonzero(~np.isfinite(host))
            truth = 0.0 if not count else math.nan if np.isnan(host).any() else math.inf
            for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
                (_, none), (value, counted) = rows(measure([mx.ones((40,)), leaf]))
                assert none == 0
                assert counted == count
                assert math.isfinite(value) if not count else str(value) == str(truth)


@every_type
@pytest.mark.parametrize("size", [1, 2, 17, 64, 131])
def test_a_bad_value_is_seen_wherever_it_stands(size: int, dtype: mx.Dtype) -> None:
    for place in range(size):
        for value in (math.nan, -math.inf):
            leaf = normal((size,), 1, dtype)
            leaf[place] = value
            for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
                ((result, bad),) = rows(measure([leaf]))
                assert (math.isfinite(result), bad) == (False, 1)


TINIEST = {mx.float32: 2.0**-149, mx.float16: 2.0**-24, mx.bfloat16: 2.0**-133, mx.complex64: 2.0**-149}


@pytest.mark.parametrize(("dtype", "tiniest"), TINIEST.items(), ids=str)
def test_subnormals_count_in_full(dtype: mx.Dtype, tiniest: float) -> None:
    below = (np.arange(100) * tiniest).astype(np.float32)
    leaf = mx.array(below).astype(dtype)
    assert wide(leaf).real.max() == 99 * tiniest
    assert_measured([leaf])
    for factor in (0.5, 0.3, 1e6, 3e38):
        assert_scaled(leaf, factor)


def test_subnormals_of_float64_are_kept() -> None:
    leaf = mx.array(np.arange(100) * 5e-324, mx.float64)
    assert rows(kernels.max_abs([leaf])) == [(99 * 5e-324, 0)]
    assert rows(kernels.sum_abs([leaf])) == [(4950 * 5e-324, 0)]
    assert_scaled(leaf, 1e6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.complex64, mx.float64], ids=str)
def test_the_whole_range_of_float32_has_a_norm(dtype: mx.Dtype) -> None:
    leaves = [normal((300,), e + 50, dtype, at=10.0**e) for e in range(-38, 36)]
    for some in (*([x] for x in leaves), leaves, [mx.full((), 3e38, dtype)], [mx.full((3,), 1e-38, dtype)]):
        total = math.fsum(value for value, _ in rows(kernels.sum_squares(some)))
        assert relative(math.sqrt(total), norm64(some)) <= 1e-13
        assert relative(dc.global_norm(some), norm64(some)) <= 1e-7
    # Of finite values.
    assert rows(kernels.sum_squares([mx.full((5,), 1e200, mx.float64)])) == [(math.inf, 0)]


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_all_bit_patterns_of_the_half_types(dtype: mx.Dtype) -> None:
    patterns = mx.array(np.arange(2**16, dtype=np.uint16)).view(dtype)
    for run in mx.split(patterns, 512):  # of one magnitude, so that no value vanishes beside another
        host = wide(run)
        if np.isfinite(host).all():
            assert_measured([run])
    bad = np.count_nonzero(~np.isfinite(wide(patterns)))
    for measure in (kernels.sum_squares, kernels.sum_abs, kernels.max_abs):
        assert rows(measure([patterns]))[0][1] == bad
    # Halves of odd subnormals are ties, 2**-12 makes subnormals, 3e38 overflows.
    for factor in (0.5, 1 / 3, 1.5, 0.999, 2.0**-12, 1e-4, 2.0**-133, 1e-45, 1.7, 1e5, 3e38, 0.0, -0.3, math.inf):
        for start in (0, 1, 5):
            assert_scaled(patterns[start:], factor)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float64, mx.complex64], ids=str)
@pytest.mark.parametrize("factor", [0.3, 1.5, 0.0, -2.0, 1e-38, 1e-45, 3e38, math.inf, math.nan])
def test_products_are_those_of_numpy(factor: float, dtype: mx.Dtype) -> None:
    bits = np.random.default_rng(2).integers(0, 2**32, 50_001, np.uint32)  # subnormals, infinities and NaN among them
    leaf = mx.array(bits).view(mx.float32)
    if dtype == mx.complex64:
        leaf = leaf[:-1].view(mx.complex64)
    assert_scaled(leaf.astype(dtype), factor)


# ------------------------------------------------------------------------------------------- whose memory it is


def address(x: mx.array) -> int:
    """Where an evaluated array lies. Nothing refers to the array afterwards."""
    return int(np.array(x.view(mx.uint8), copy=False).ctypes.data)


def clipped_by(**options: Any) -> Callable[[list[mx.array]], list[mx.array]]:
    def clip(grads: list[mx.array]) -> list[mx.array]:
        tree = dict(enumerate(grads))
        grads.clear()
        return list(dc.clip_grad_norm(tree, 0.1, **options)[0].values())

    return clip


def given_up(grads: list[mx.array]) -> list[mx.array]:
    taken = grads[:]
    grads.clear()
    return taken


def scaled_by_leaf(grads: list[mx.array]) -> list[mx.array]:
    factors = mx.array([0.3, 7.0] * len(grads))[::2]
    return kernels.scale(given_up(grads), factors)


def measured_before(grads: list[mx.array]) -> list[mx.array]:
    mx.eval(kernels.sum_squares(grads))
    return kernels.scale(given_up(grads), mx.array(0.3))


def in_one_graph(grads: list[mx.array]) -> list[mx.array]:
    total = mx.sum(kernels.sum_squares(grads)[:, 0]).astype(mx.float32)
    return kernels.scale(given_up(grads), 1 / (1 + total), mx.isfinite(total))


# From gradients, which they take away from the caller, to scaled ones; nothing of it is evaluated.
SCALINGS: dict[str, Callable[[list[mx.array]], list[mx.array]]] = {
    "scaled": lambda grads: kernels.scale(given_up(grads), mx.array(0.3)),
    "scaled by leaf": scaled_by_leaf,
    "measured before": measured_before,
    "in one graph": in_one_graph,
    "clipped": clipped_by(),
    "clipped or zero": clipped_by(nonfinite="zero"),
    "clipped or raised": clipped_by(nonfinite="raise"),
    "clipped by the largest": clipped_by(norm_type=math.inf),
    "clipped by the sum": clipped_by(norm_type=1.0),
    "with a known norm": lambda grads: dc.clip_grads_with_norm(given_up(grads), 0.1, mx.array(2.0)),
}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


@every_type
@every_scaling
def test_gradients_that_are_given_up_are_scaled_in_place(scaling: Any, dtype: mx.Dtype) -> None:
    if dtype == mx.complex64 and scaling in (SCALINGS["clipped by the largest"], SCALINGS["clipped by the sum"]):
        pytest.skip("MLX takes the magnitudes, and holds the leaf for it")
    shapes: list[tuple[int, ...]] = [(40_000,), (300, 200), (2**17 + 3,)]
    grads = [evaluated(shape, 1, dtype) for shape in shapes]
    expected = [parts(x) for x in scaling([evaluated(shape, 1, dtype) for shape in shapes])]
    places = [address(x) for x in grads]
    mx.synchronize()  # MLX's thread may still hold what it has just evaluated
    scaled = scaling(grads)
    mx.eval(scaled)
    assert [address(x) for x in scaled] == places
    for x, values in zip(scaled, expected, strict=True):
        assert_same(x, values)


def test_clipping_takes_no_memory_of_its_own() -> None:
    grads = {"w": evaluated((600, 500), 1), "t": evaluated((600, 500), 2).T, "h": evaluated((400, 999), 3)}
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    grads, norm = dc.clip_grad_norm(grads, 0.1)
    mx.eval(grads, norm)
    assert mx.get_peak_memory() - before < 2**16


KEEP: dict[str, Callable[[mx.array], Any]] = {
    "the array": lambda x: x,
    "a slice": lambda x: x[1:],
    "another shape": lambda x: x.reshape(-1, 8),
    "transposed": lambda x: x.reshape(-1, 8).T,
    "other bits": lambda x: x.view(mx.int32),
    "NumPy's view": lambda x: np.array(x, copy=False),
    "a graph that reads it": lambda x: x * 3,
    "a sum that reads it": lambda x: kernels.sum_squares([x]),
    "a graph with a slice of it": lambda x: mx.exp(x[5:]),
}


@every_scaling
@pytest.mark.parametrize("together", [False, True], ids=["later", "together"])
@pytest.mark.parametrize("looked_at", [False, True], ids=["lazy", "evaluated"])
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_what_is_still_needed_is_not_written(keep: Any, looked_at: bool, together: bool, scaling: Any) -> None:
    expected = np.array(keep(evaluated((40_000,))))
    truth = [parts(x) for x in scaling([evaluated((40_000,))])]
    grads = [evaluated((40_000,))]
    kept = keep(grads[0])
    lazy = isinstance(kept, mx.array)
    if looked_at and lazy:
        mx.eval(kept)
    scaled = scaling(grads)
    mx.eval(scaled, *([kept] if together and lazy else []))
    assert np.array_equal(np.array(kept), expected)
    assert_same(scaled[0], truth[0])


@every_type
def test_a_factor_of_1_leaves_the_bits_where_they_are(dtype: mx.Dtype) -> None:
    grads = [evaluated((40_000,), 1, dtype)]
    place, before = address(grads[0]), parts(grads[0])
    scaled = kernels.scale(given_up(grads), mx.array(1.0), mx.array(True))[0]
    assert_same(scaled, before)
    assert address(scaled) == place


def test_only_leaves_whose_factor_is_not_1_are_written() -> None:
    grads = [evaluated((40_000,), seed) for seed in range(3)]
    places, before = [address(x) for x in grads], [parts(x) for x in grads]
    scaled = kernels.scale(given_up(grads), mx.array([1.0, 0.5, 1.0]))
    mx.eval(scaled)
    assert [address(x) for x in scaled] == places
    for x, old, factor in zip(scaled, before, (1.0, 0.5, 1.0), strict=True):
        assert_same(x, old * factor)


@every_type
@pytest.mark.parametrize("condition", [True, False])
def test_select_uses_the_buffer_of_the_updated_array(condition: bool, dtype: mx.Dtype) -> None:
    updated, old = evaluated((40_000,), 1, dtype), evaluated((40_000,), 2, dtype)
    place, expected = address(updated), parts(updated if condition else old)
    arrays = [updated]
    del updated
    selected = kernels.select(mx.array(condition), given_up(arrays), [old])[0]
    assert_same(selected, expected)
    assert address(selected) == place


@every_type
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], ids=hex)
def test_every_nan_makes_every_value_nan(bits: int, dtype: mx.Dtype) -> None:
    factor = mx.array(bits, mx.uint32).view(mx.float32)
    assert np.isnan(parts(kernels.scale([normal((77,), 1, dtype)], factor)[0])).all()


@every_type
@pytest.mark.parametrize("keep", [False, True], ids=["given up", "kept"])
@pytest.mark.parametrize("factor", [1.0, 0.3, math.nan])
def test_zeros_where_not_finite(factor: float, keep: bool, dtype: mx.Dtype) -> None:
    grads = [evaluated((size,), 1, dtype) for size in (1, 77, 40_000, 2**17 + 1)]
    kept = grads[:] if keep else []
    before = [parts(x) for x in grads]
    for x, old in zip(kernels.scale(given_up(grads), mx.array(factor), mx.array(False)), before, strict=True):
        assert_same(x, np.zeros(old.size))
    for x, old in zip(kept, before, strict=False):
        assert_same(x, old)


@every_scaling
def test_the_same_leaf_twice_is_scaled_once(scaling: Any) -> None:
    truth = [parts(x) for x in scaling([evaluated((40_000,)), evaluated((40_000,))])]
    leaf = evaluated((40_000,))
    grads = [leaf, leaf]
    del leaf
    for x, values in zip(scaling(grads), truth, strict=True):
        assert_same(x, values)


SHARING: dict[str, Callable[[mx.array], list[mx.array]]] = {
    "halves": lambda x: [x[:20_000], x[20_000:]],
    "overlapping": lambda x: [x[:-4], x[4:], x[2:-2]],
    "a slice of it": lambda x: [x, x[1:]],
    "transposed": lambda x: [x.reshape(200, 200).T, x.reshape(200, 200)],
    "broadcast": lambda x: [mx.broadcast_to(x[None], (3, 40_000)), x],
}


@every_scaling
@pytest.mark.parametrize("looked_at", [False, True], ids=["lazy", "evaluated"])
@pytest.mark.parametrize("views", SHARING.values(), ids=SHARING)
def test_leaves_that_share_memory(views: Any, looked_at: bool, scaling: Any) -> None:
    def copies() -> list[mx.array]:
        return [mx.array(np.array(view)) for view in views(evaluated((40_000,)))]

    truth = [parts(x) for x in scaling(copies())]
    grads = views(evaluated((40_000,)))
    if looked_at:
        mx.eval(grads)
    scaled = scaling(grads)
    mx.eval(scaled)
    for x, values in zip(scaled, truth, strict=True):
        assert_same(x, values)


# -------------------------------------------------------------------------------------- streams and threads


@pytest.fixture(scope="module")
def other() -> mx.Stream:
    return mx.new_stream(mx.cpu)


READERS: dict[str, Callable[[mx.array, mx.Stream], mx.array]] = {
    "a product": lambda x, on: mx.multiply(x, 3, stream=on),
    "a sum": lambda x, on: kernels.sum_squares([x], on),
    "a scaled copy": lambda x, on: kernels.scale([x], mx.array(3.0), stream=on)[0],
}


@every_scaling
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_read_that_waits_on_another_stream_sees_the_old_values(read: Any, scaling: Any, other: mx.Stream) -> None:
    busy = mx.sort(normal((300_000,), 1), stream=other)
    expected = np.array(read(evaluated((40_000,)), mx.default_stream(mx.cpu)))
    grads = [evaluated((40_000,))]
    kept = read(grads[0], other)
    mx.async_eval(busy)
    mx.async_eval(kept)  # behind it
    mx.eval(scaling(grads))
    assert np.array_equal(np.array(kept), expected)


def test_sums_and_products_may_be_on_different_streams(other: mx.Stream) -> None:
    for _ in range(20):
        grads = [evaluated((40_000,))]
        truth = parts(in_one_graph([evaluated((40_000,))])[0])
        total = mx.sum(kernels.sum_squares(grads, other)[:, 0]).astype(mx.float32)
        assert_same(kernels.scale(given_up(grads), 1 / (1 + total))[0], truth)


@every_scaling
def test_inputs_of_a_compiled_function_stay(scaling: Any) -> None:
    compiled = mx.compile(lambda *grads: scaling(list(grads)))
    if scaling is SCALINGS["measured before"] or scaling is SCALINGS["clipped or raised"]:
        pytest.skip("it evaluates")
    grads = [evaluated((40_000,)), evaluated((300, 200), 2).T]
    before = [parts(x) for x in grads]
    for _ in range(3):
        for x, values in zip(compiled(*grads), scaling(grads[:]), strict=True):
            np.testing.assert_allclose(parts(x), parts(values), rtol=1e-6)
        for x, old in zip(grads, before, strict=True):
            assert_same(x, old)


def test_results_may_be_dropped_before_they_are_there(other: mx.Stream) -> None:
    kept = []
    for i in range(60):
        grads = [evaluated((50_000 + i,), i), mx.exp(normal((9000,), i))]
        mx.async_eval(grads if i % 2 else [])
        total = kernels.sum_squares(grads, other if i % 3 == 0 else None)
        scaled = clipped_by()(grads)
        mx.async_eval(total, scaled)
        kept += scaled[1:] if i % 10 == 0 else []
        del total, scaled
        mx.eval(mx.zeros((50_000,)))
    mx.synchronize()
    for i, x in zip(range(0, 60, 10), kept, strict=True):
        assert_same(x, parts(clipped_by()([evaluated((50_000 + i,), i), mx.exp(normal((9000,), i))])[1]))


def test_python_threads_work_side_by_side() -> None:
    """Each on a stream of its own; one of them at a time has the threads that share large work."""
    shapes: list[tuple[int, ...]] = [(2**19 + 5,), (300, 200), (7,)]
    truth = [parts(x) for x in clipped_by()([evaluated(shape, 1) for shape in shapes])]
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                for _ in range(10):
                    for x, values in zip(clipped_by()([evaluated(shape, 1) for shape in shapes]), truth, strict=True):
                        assert_same(x, values)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ------------------------------------------------------------------------------------------- transformations

WEIGHTS = normal((40,), 9)
FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "norm": lambda x: dc.global_norm({"w": x, "v": [2 * x[:3], x[1]]}),
    "sum": lambda x: dc.global_norm({"w": x, "v": [2 * x[:3], x[1]]}, norm_type=1.0),
    "largest": lambda x: dc.global_norm({"w": x, "v": [x[:3] / 2, x[1]]}, norm_type=math.inf),
    "clipped": lambda x: (WEIGHTS * dc.clip_grad_norm({"w": x, "v": x[:2]}, 0.5)[0]["w"]).sum(),
    "not clipped": lambda x: (WEIGHTS * dc.clip_grad_norm({"w": x, "v": x[:2]}, 50.0)[0]["w"]).sum(),
    "clipped or zero": lambda x: (WEIGHTS * dc.clip_grad_norm(x, 0.5, nonfinite="zero")[0]).sum(),
    "with a known norm": lambda x: (WEIGHTS * dc.clip_grads_with_norm(x, 0.5, x[0] + 9)).sum(),
}
Function = Callable[[mx.array], mx.array]
TRANSFORMED: dict[str, Callable[[Function, mx.array], Any]] = {
    "grad": lambda f, x: mx.grad(f)(x),
    "grad of grad": lambda f, x: mx.grad(lambda y: (mx.grad(f)(y) * WEIGHTS).sum())(x),
    "jvp": lambda f, x: mx.jvp(f, [x], [WEIGHTS])[1][0],
    "vmap": lambda f, x: mx.vmap(f)(mx.stack([x, 2 * x, x * x])),
    "vmap over columns": lambda f, x: mx.vmap(f, in_axes=1)(mx.stack([x, 2 * x, x * x], axis=1)),
    "vmap of grad": lambda f, x: mx.vmap(mx.grad(f))(mx.stack([x, 2 * x, x * x])),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled before"])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_transformations_are_those_of_the_mlx_operations(
    function: Any, transformed: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal((40,), 1)

    def run() -> Array:
        def own(y: mx.array) -> Any:  # what MLX compiled is known by its function
            return function(y)

        ready: Any = mx.compile(own) if compiled else own
        ready(x)
        return wide(transformed(ready, x))

    by_kernel = run()
    monkeypatch.setattr(native, "load", lambda: None)
    assert np.isfinite(by_kernel).all()
    np.testing.assert_allclose(by_kernel, run(), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_of_gradients_and_clipping_works() -> None:
    def step(x: mx.array) -> mx.array:
        gradient: mx.array = dc.clip_grad_norm(mx.grad(FUNCTIONS["clipped"])(x), 0.1)[0]
        return gradient

    x = normal((40,), 1)
    np.testing.assert_allclose(wide(mx.compile(step)(x)), wide(step(x)), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ which engine


def test_the_engine_is_named() -> None:
    assert kernels.engine() == kernels.engine(mx.cpu) == kernels.engine(mx.default_stream(mx.cpu)) == "native"
    assert kernels.engine(mx.gpu) == "mlx"
    kernel = load()
    assert kernel is not None
    assert kernel.instructions in ("avx512", "avx2", "baseline")
    assert kernel.threads >= 1


WHICH = """
import sys, warnings
if "distclip" in __import__("os").listdir():  # a copy of the package, which an editable install would hide
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import distclip as dc, mlx.core as mx
    from distclip.engine import kernels
    for _ in range(3):
        norm = dc.clip_grad_norm([mx.full((4,), 3.0)], 1.0, stream=mx.cpu)[1].item()
    warned = [str(w.message) for w in seen if w.category is RuntimeWarning]
print(kernels.engine(mx.cpu), norm, len(warned), *warned)
"""


@pytest.mark.launches
@pytest.mark.parametrize(("wanted", "engine"), [("", "native"), ("native", "native"), ("mlx", "mlx")])
def test_the_environment_chooses_the_engine(wanted: str, engine: str, tmp_path: Path) -> None:
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE=wanted)
    assert (ended.code, ended.output.split()) == (0, [engine, "6.0", "0"]), ended.output


def copied_package(folder: Path) -> Path:
    """A copy of the package that a program in the folder imports; its kernel's file."""
    shutil.copytree(Path(dc.__file__).parent, folder / "distclip", ignore=shutil.ignore_patterns("__pycache__"))
    kernel: Any = load()
    return Path(shutil.copy(kernel.__file__, folder / "distclip" / "engine" / "native"))


@pytest.mark.launches
def test_a_kernel_of_another_mlx_is_refused_with_one_warning(tmp_path: Path) -> None:
    kernel = copied_package(tmp_path)
    kernel.rename(kernel.with_name(kernel.name.replace(kernel.name.split(".")[0], module_name("0.1.0"))))
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="")
    assert ended.code == 0, ended.output
    assert ended.output.startswith("mlx 6.0 1 distclip's kernel was built for mlx 0.1.0, and mlx "), ended.output
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="mlx")
    assert (ended.code, ended.output.split()) == (0, ["mlx", "6.0", "0"]), ended.output
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="native")
    assert ended.code == 1
    assert "ImportError: distclip's kernel was built for mlx 0.1.0" in ended.output


@pytest.mark.launches
def test_without_a_kernel_the_mlx_operations_serve_silently(tmp_path: Path) -> None:
    copied_package(tmp_path).unlink()
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="")
    assert (ended.code, ended.output.split()) == (0, ["mlx", "6.0", "0"]), ended.output
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="native")
    assert ended.code == 1
    assert "ImportError: distclip's kernel was not built" in ended.output


@pytest.mark.launches
def test_a_kernel_that_cannot_be_loaded_is_said_so(tmp_path: Path) -> None:
    copied_package(tmp_path).write_bytes(b"no library")
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="")
    assert (ended.code, ended.output.split()[:3]) == (0, ["mlx", "6.0", "1"]), ended.output
    assert "distclip's kernel could not be loaded: " in ended.output


BROKEN = {
    "which refuses MLX's arrays": (
        "raise TypeError('sum_squares(): incompatible arguments')",
        "cannot work with MLX's",
    ),
    "which measures wrongly": ("return mx.array([[24.0, 0.0]])", "measures 3 and 4 as [[24.0, 0.0]], not as 25"),
    "of an earlier version": ("return mx.array([25.0, 0.0])", "measures 3 and 4 as [25.0, 0.0], not as 25"),
}


@pytest.mark.launches
@pytest.mark.parametrize(("body", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_kernel_must_measure_rightly_before_it_is_used(body: str, problem: str, tmp_path: Path) -> None:
    kernel = copied_package(tmp_path)
    kernel.unlink()
    program = f"import mlx.core as mx\ndef sum_squares(leaves, stream):\n    {body}\n"
    kernel.with_name(module_name(version("mlx")) + ".py").write_text(program)
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="")
    assert (ended.code, ended.output.split()[:3]) == (0, ["mlx", "6.0", "1"]), ended.output
    assert f"distclip's kernel {problem}" in ended.output
    ended = launching.alone(WHICH, tmp_path, DISTCLIP_ENGINE="native")
    assert ended.code == 1
    assert f"ImportError: distclip's kernel {problem}" in ended.output


@pytest.mark.launches
@pytest.mark.parametrize("first", ["mx.compile(f)(x)", "mx.grad(f)(x)", "mx.vmap(f)(x[None])"])
def test_the_first_use_may_be_inside_a_transformation(first: str, tmp_path: Path) -> None:
    program = f"""
    import mlx.core as mx
    from distclip.engine import kernels
    mx.set_default_device(mx.cpu)
    x = mx.ones(5)
    f = lambda x: kernels.sum_squares([x])[0, 0]
    result = {first}
    print(kernels.engine(), mx.sum(result).item())
    """
    ended = launching.alone(program, tmp_path, DISTCLIP_ENGINE="native")
    total = "10.0" if "grad" in first else "5.0"
    assert (ended.code, ended.output.split()) == (0, ["native", total]), ended.output


# --------------------------------------------------------------------- the same bits by any threads and instructions

RESULTS = """
import zlib
import mlx.core as mx, numpy as np
from distclip.engine import kernels, native
from distclip.engine.native import load
mx.set_default_device(mx.cpu)
print(load().threads, load().instructions)
host = np.random.default_rng(1).standard_normal((2, 2**19 + 13), np.float32)
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    whole = mx.array(host).astype(dtype)
    for leaf in (whole, whole.T, whole[:, 1:-5], whole[0, :77]):
        results = [kernels.sum_squares([leaf])[0], kernels.sum_abs([leaf])[0], kernels.max_abs([leaf])[0]]
        exact = [x.hex() for pair in results for x in pair.tolist()]
        norms = mx.stack([mx.sqrt(results[0][0]), results[1][0], results[2][0]]).astype(mx.float32).tolist()
        scaled = mx.contiguous(kernels.scale([leaf], mx.array(0.3))[0]).reshape(-1)
        print(exact, "|", [x.hex() for x in norms], zlib.crc32(np.array(scaled.view(mx.uint8))))
"""


@pytest.mark.launches
def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    results = set()
    for n in (1, 2, 4):
        ended = launching.alone(RESULTS, tmp_path, OMP_NUM_THREADS=str(n))
        first, *rest = ended.output.splitlines()
        assert (ended.code, first.split()[0], len(rest)) == (0, str(n), 12), ended.output
        results.add(tuple(rest))
    assert len(results) == 1


@pytest.mark.launches
def test_instruction_sets_give_the_same_norm(tmp_path: Path) -> None:
    """The last bits of a float64 sum depend on the order of the additions; the float32 norm does not."""
    results = set()
    for wanted in ("baseline", "avx2", "avx512"):  # or the best there is
        ended = launching.alone(RESULTS, tmp_path, DISTCLIP_ISA=wanted)
        first, *rest = ended.output.splitlines()
        assert (ended.code, len(rest)) == (0, 12), ended.output
        assert first.split()[1] == "baseline" or wanted != "baseline"
        results.add(tuple(line.partition("|")[2] for line in rest))
    assert len(results) == 1


@pytest.mark.launches
def test_a_forked_child_ends_cleanly(tmp_path: Path) -> None:
    """Workers of the parent do not exist in the child, which uses nothing of MLX, as loaders of data do."""
    program = """
    import multiprocessing
    import mlx.core as mx
    from distclip.engine import kernels
    def total():
        return kernels.sum_squares([mx.ones((2**20,))], mx.cpu)[0, 0].item()
    first = total()
    for _ in range(3):
        child = multiprocessing.get_context("fork").Process(target=print, args=("child",))
        child.start()
        child.join(10)
        print("exit code", child.exitcode, total() == first)
    """
    ended = launching.alone(program, tmp_path, OMP_NUM_THREADS="4", PYTHONWARNINGS="ignore")
    assert ended.code == 0, ended.output
    assert ended.output.count("child") == ended.output.count("exit code 0 True") == 3, ended.output
