"""Clipping: MLX's results in one process, one scale for all ranks, and what a bad gradient does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from reference import (
    DTYPES,
    EPSILON,
    NORM_ERROR,
    WORLD,
    alone,
    assert_close,
    leaves,
    norm64,
    normal,
    relative,
    same_bits,
    several,
    told_by_all,
    wide,
)

import distclip as dc

# Trees that are the same on every rank.
TREES: dict[str, Callable[[mx.Dtype], Any]] = {
    "single array": lambda d: normal((6, 7), 1, d),
    "0-d": lambda d: normal((), 1, d),
    "dict": lambda d: {"w": normal((20, 30), 1, d), "b": normal((20,), 2, d)},
    "nested": lambda d: {
        "layers": [{"w": normal((4, 4), 1, d)}, [normal((3,), 2, d)]],
        "head": (normal((2,), 3, d), []),
    },
    "an empty leaf": lambda d: [normal((0, 3), 1, d), normal((8,), 2, d)],
    "hundreds": lambda d: [normal((i % 7, 5), i, d) for i in range(300)],
}
# In one process a gradient is the same whatever its layout says.
SAME = [dc.Replicated(), dc.Sharded()] if WORLD.size == 1 else [dc.Replicated()]


def shapes_and_types(tree: Any) -> Any:
    return tree_map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("layout", SAME, ids=str)
def test_the_documented_example_of_mlx(layout: Any) -> None:
    grads = {"w1": mx.array([2, 3]), "w2": mx.array([1])}
    clipped, norm = dc.clip_grad_norm(grads, max_norm=2.0, layout=layout)
    expected, expected_norm = optim.clip_grad_norm(grads, max_norm=2.0)
    assert shapes_and_types(clipped) == shapes_and_types(expected)
    assert relative(norm, math.sqrt(14)) <= 1e-7
    assert relative(expected_norm, math.sqrt(14)) <= 1e-6
    for name in grads:
        assert clipped[name].dtype == mx.float32
        assert_close(clipped[name], wide(expected[name]))


@pytest.mark.parametrize("layout", SAME, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n not in ("complex64", "bool")], ids=str)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_it_equals_mlx(tree: Any, dtype: mx.Dtype, max_norm: float, layout: Any) -> None:
    with mx.stream(mx.cpu):
        grads = tree(dtype)
        clipped, norm = dc.clip_grad_norm(grads, max_norm, layout=layout)
        expected, expected_norm = optim.clip_grad_norm(grads, max_norm)
        low = dtype == mx.bfloat16  # whose norm MLX adds up in bfloat16
        assert relative(norm, norm64(grads)) <= NORM_ERROR
        assert relative(norm, float(expected_norm)) <= (3e-2 if low else 1e-6)
        assert shapes_and_types(clipped) == shapes_and_types(expected)
        for found, by_mlx in zip(leaves(clipped), leaves(expected), strict=True):
            assert_close(found, wide(by_mlx), 4e-2 if low else None)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e5, math.inf])
def test_shards_are_scaled_by_the_true_norm(
    max_norm: float, dtype: mx.Dtype, norm_type: float, world: dc.World
) -> None:
    if dtype == mx.complex64 and norm_type != 2:
        pytest.skip("the norm of complex values is tested beside the norm")
    grads = {"s": normal((30, 4), world.rank, dtype), "r": normal((9,), 70, dtype)}
    clipped, norm = dc.clip_grad_norm(
        grads, max_norm, layout={"s": dc.Sharded(), "r": dc.Replicated()}, norm_type=norm_type
    )
    truth = norm64([*(normal((30, 4), rank, dtype) for rank in range(world.size)), grads["r"]], norm_type)
    assert relative(norm, truth) <= NORM_ERROR
    scale = 1.0 if math.isinf(max_norm) else min(1.0, max_norm / (truth + 1e-6))
    for before, after in zip(leaves(grads), leaves(clipped), strict=True):
        assert after.dtype == (dtype if mx.issubdtype(dtype, mx.inexact) else mx.float32)
        assert_close(after, wide(before) * scale, max(2 * EPSILON[after.dtype], 4 * 2**-23))
    assert same_bits([norm, clipped["r"]])


@pytest.mark.parametrize("grads", [{}, [], (), {"a": {}, "b": []}], ids=str)
def test_an_empty_tree_comes_back(grads: Any) -> None:
    clipped, norm = dc.clip_grad_norm(grads, 1.0)
    assert clipped == grads
    assert (norm.item(), norm.dtype, norm.shape) == (0.0, mx.float32, ())


def test_none_leaves_stay(world: dc.World) -> None:
    clipped, norm = dc.clip_grad_norm({"a": None, "b": [mx.ones((4,)), None]}, 1.0)
    assert (clipped["a"], clipped["b"][1]) == (None, None)
    assert norm.item() == pytest.approx(2 * math.sqrt(world.size))
    assert dc.clip_grad_value({"a": None}, 1.0) == dc.clip_grads_with_norm({"a": None}, 1.0, norm) == {"a": None}


def test_the_callers_tree_is_not_changed(world: dc.World) -> None:
    inner = [normal((5,), world.rank)]
    grads = {"a": inner, "b": normal((3,), world.rank)}
    before = [np.array(leaf) for leaf in leaves(grads)]
    for clip in (
        lambda: dc.clip_grad_norm(grads, 1e-3)[0],
        lambda: dc.clip_grad_norm(grads, 1e-3, nonfinite="zero")[0],
        lambda: dc.clip_grad_value(grads, 1e-3),
        lambda: dc.clip_grads_with_norm(grads, 1e-3, mx.array(5.0)),
    ):
        clipped = clip()
        mx.eval(clipped)
        assert clipped is not grads
        assert grads["a"] is inner
        assert all(np.array_equal(old, np.array(leaf)) for old, leaf in zip(before, leaves(grads), strict=True))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 30.0])
def test_clipping_twice_equals_clipping_once(max_norm: float, world: dc.World) -> None:
    once, _ = dc.clip_grad_norm({"w": normal((40, 5), world.rank)}, max_norm)
    twice, norm = dc.clip_grad_norm(once, max_norm)
    assert norm.item() <= max_norm * (1 + 1e-6)  # type: ignore[operator]
    assert_close(twice["w"], wide(once["w"]), 1e-5)


@pytest.mark.parametrize(
    "form", [mx.array, lambda x: mx.array([x]), lambda x: mx.array(x, mx.float16), np.float64, int]
)
@pytest.mark.parametrize("max_norm", [0, 1, math.inf])
def test_the_threshold_may_have_any_scalar_form(form: Any, max_norm: float, world: dc.World) -> None:
    if form is int and math.isinf(max_norm):
        return
    grads = normal((50,), world.rank)
    expected, _ = dc.clip_grad_norm(grads, float(max_norm))
    clipped, _ = dc.clip_grad_norm(grads, form(max_norm))
    assert_close(clipped, wide(expected))
    assert_close(dc.clip_grads_with_norm(grads, form(max_norm), dc.global_norm(grads)), wide(expected))


@pytest.mark.parametrize("max_norm", [-1.0, -1e-9, math.nan, -math.inf])
def test_a_negative_threshold_is_an_error(max_norm: float) -> None:
    for call in (
        lambda: dc.clip_grad_norm({"w": mx.ones(3)}, max_norm),
        lambda: dc.clip_grads_with_norm({"w": mx.ones(3)}, max_norm, mx.array(1.0)),
        lambda: dc.average_and_clip({"w": mx.ones(3)}, max_norm),
    ):
        with pytest.raises(ValueError, match=f"max_norm should be >= 0, {max_norm} was"):
            call()


def test_a_negative_array_as_threshold_counts_as_0() -> None:
    clipped, _ = dc.clip_grad_norm(mx.array([3.0, -4.0]), mx.array(-2.0))
    assert_close(clipped, np.zeros(2))


@pytest.mark.parametrize("leaf", [1.0, "w", np.ones(3)], ids=lambda leaf: type(leaf).__name__)
def test_a_leaf_that_is_no_array_is_named(leaf: Any) -> None:
    grads = {"a": [mx.ones(3), leaf]}
    for call in (
        lambda: dc.clip_grad_norm(grads, 1.0),
        lambda: dc.clip_grads_with_norm(grads, 1.0, mx.array(1.0)),
        lambda: dc.clip_grad_value(grads, 1.0),
    ):
        with pytest.raises(TypeError, match=r"'a\.1'"):
            call()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 0.7, math.inf])
def test_clipping_with_a_known_norm_gives_the_same_bits(max_norm: float, dtype: mx.Dtype, world: dc.World) -> None:
    grads = [normal((30, 4), world.rank, dtype), normal((), world.rank, dtype)]
    clipped, norm = dc.clip_grad_norm(grads, max_norm)
    again = dc.clip_grads_with_norm(grads, max_norm, norm)
    assert all(np.array_equal(wide(a), wide(b)) for a, b in zip(clipped, again, strict=True))


def test_a_tiny_scale_does_not_lose_half_precision_gradients(world: dc.World) -> None:
    grads = mx.full((4096,), 6e4, mx.float16)
    clipped, _ = dc.clip_grad_norm(grads, 1.0)  # a scale of 2.6e-7, which float16 has not
    assert_close(clipped, wide(grads) / (6e4 * 64 * math.sqrt(world.size)))


# ------------------------------------------------------------------------------------------- by value


@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n != "complex64"], ids=str)
@pytest.mark.parametrize("limit", [0, 0.5, 2.0, math.inf])
def test_values_are_limited_as_numpy_does(limit: float, dtype: mx.Dtype) -> None:
    grads = {"w": normal((30, 4), 1, dtype), "b": [normal((), 2, dtype), normal((0,), 3, dtype)]}
    clipped = dc.clip_grad_value(grads, limit)
    for before, after in zip(leaves(grads), leaves(clipped), strict=True):
        assert after.dtype == (dtype if mx.issubdtype(dtype, mx.floating) else mx.float32)
        assert np.array_equal(wide(after), np.clip(wide(before), -limit, limit))


def test_a_nan_stays_and_an_infinity_is_limited() -> None:
    clipped = dc.clip_grad_value(mx.array([math.nan, math.inf, -math.inf]), 2.0)
    assert np.array_equal(np.array(clipped), [math.nan, 2.0, -2.0], equal_nan=True)


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_negative_limit_is_an_error(limit: float) -> None:
    with pytest.raises(ValueError, match="clip_value should be >= 0"):
        dc.clip_grad_value(mx.ones(3), limit)


def test_complex_values_have_no_limit() -> None:
    with pytest.raises(TypeError, match="'a' is complex"):
        dc.clip_grad_value({"a": normal((3,), 1, mx.complex64)}, 1.0)


# ------------------------------------------------------------------------------------------ not finite

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def spoiled(value: float, bad_rank: int, rank: int) -> dict[str, Any]:
    grads = {"layers": [{"w": normal((8, 9), rank)}, {"w": normal((3000,), rank, mx.bfloat16)}], "n": mx.array([3, 4])}
    if rank == bad_rank:
        grads["layers"][1]["w"][1234] = value  # type: ignore[index]
    return grads


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_propagate_does_what_mlx_does_on_every_rank(value: float, norm_type: float, world: dc.World) -> None:
    for bad in range(world.size):
        clipped, norm = dc.clip_grad_norm(spoiled(value, bad, world.rank), 1.0, norm_type=norm_type)
        first = np.array(clipped["layers"][0]["w"])
        if math.isnan(value):
            assert math.isnan(norm.item())  # type: ignore[arg-type]
            assert np.isnan(first).all()
        else:
            assert norm.item() == math.inf
            assert np.all(first == 0)
            place: Any = clipped["layers"][1]["w"][1234].item()
            assert math.isnan(place) if world.rank == bad else place == 0


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_zero_makes_every_gradient_zero_on_every_rank(value: float, norm_type: float, world: dc.World) -> None:
    for bad in range(world.size):
        grads = spoiled(value, bad, world.rank)
        clipped, norm = dc.clip_grad_norm(grads, 1.0, norm_type=norm_type, nonfinite="zero")
        assert not math.isfinite(norm.item())  # type: ignore[arg-type]
        assert [leaf.dtype for leaf in leaves(clipped)] == [mx.float32, mx.bfloat16, mx.float32]
        assert all(np.all(wide(leaf) == 0) for leaf in leaves(clipped))


def test_zero_keeps_a_finite_gradient(world: dc.World) -> None:
    grads = spoiled(1.0, 0, world.rank)
    clipped, norm = dc.clip_grad_norm(grads, 1.0, nonfinite="zero")
    expected, expected_norm = dc.clip_grad_norm(grads, 1.0)
    assert norm.item() == expected_norm.item()
    assert all(np.array_equal(wide(a), wide(b)) for a, b in zip(leaves(clipped), leaves(expected), strict=True))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_raise_names_the_rank_and_the_leaf_on_every_rank(value: float, norm_type: float, world: dc.World) -> None:
    kind = "1 NaN" if math.isnan(value) else "1 infinite"
    for bad in range(world.size):
        with pytest.raises(FloatingPointError) as error:
            dc.clip_grad_norm(spoiled(value, bad, world.rank), 1.0, norm_type=norm_type, nonfinite="raise")
        assert f"rank {bad}: 'layers.1.w' ({kind})" in str(error.value)
        assert "layers.0.w" not in str(error.value)
        assert len(set(told_by_all(str(error.value)))) == 1


@several
def test_raise_names_every_bad_rank(world: dc.World) -> None:
    grads = {"w": mx.array([1.0, math.nan if world.rank != 0 else 0.0])}
    with pytest.raises(FloatingPointError) as error:
        dc.clip_grad_norm(grads, 1.0, nonfinite="raise")
    assert all((f"rank {rank}: 'w' (1 NaN)" in str(error.value)) == (rank != 0) for rank in range(world.size))


def test_raise_names_a_bad_replica() -> None:
    with pytest.raises(FloatingPointError, match=r"'w' \(2 NaN and 1 infinite\)"):
        dc.clip_grad_norm(
            {"w": mx.array([math.nan, math.nan, math.inf])}, 1.0, layout=dc.Replicated(), nonfinite="raise"
        )


def test_raise_says_nothing_of_a_finite_gradient(world: dc.World) -> None:
    _, norm = dc.clip_grad_norm(spoiled(1.0, 0, world.rank), 1.0, nonfinite="raise")
    assert math.isfinite(norm.item())  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "norm_type"), [(1e100, 2.0), (1e200, 2.0), (1e100, math.inf), (1e20, 20.0)])
def test_a_norm_that_is_infinite_is_not_finite(value: float, norm_type: float) -> None:
    """Finite values may have a norm beyond float32: what is returned decides, so the two never contradict."""
    grads = mx.full((4,), value, mx.float64, stream=mx.cpu)
    if math.isfinite(dc.global_norm(grads, norm_type=norm_type).item()):  # type: ignore[arg-type]
        dc.clip_grad_norm(grads, 1.0, norm_type=norm_type, nonfinite="raise")
    else:
        with pytest.raises(FloatingPointError):
            dc.clip_grad_norm(grads, 1.0, norm_type=norm_type, nonfinite="raise")


@pytest.mark.parametrize("policy", ["skip", "", "RAISE", None])
def test_an_unknown_policy_is_an_error(policy: Any) -> None:
    for call in (dc.clip_grad_norm, dc.average_and_clip):
        with pytest.raises(ValueError, match="nonfinite should be one of 'propagate', 'raise', 'zero'"):
            call({"w": mx.ones(3)}, 1.0, nonfinite=policy)


# ------------------------------------------------------------------------------------------- inside compile


@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize("threshold", [0.05, 1e6])
def test_a_compiled_training_step_equals_the_eager_one(threshold: float, policy: str, world: dc.World) -> None:
    def train(compiled: bool) -> tuple[Any, list[float]]:
        mx.random.seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = optim.AdamW(1e-2)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        def loss(x: mx.array) -> Any:
            return (model(x) - x.sum(axis=1, keepdims=True)).square().mean()

        def step(x: mx.array) -> mx.array:
            _, grads = nn.value_and_grad(model, loss)(x)
            grads, norm = dc.clip_grad_norm(grads, threshold, nonfinite=policy)
            optimizer.update(model, grads)
            return norm

        run: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        norms = []
        for i in range(4):
            norm = run(normal((5, 6), (world.rank, i)))
            mx.eval(state, norm)
            norms.append(norm.item())
        return model.parameters(), norms

    eager, eager_norms = train(compiled=False)
    compiled, norms = train(compiled=True)
    assert norms == pytest.approx(eager_norms, rel=1e-5)
    for found, expected in zip(leaves(compiled), leaves(eager), strict=True):
        assert_close(found, wide(expected), 1e-5)


def test_a_threshold_may_be_an_input_of_a_compiled_step(world: dc.World) -> None:
    clip = mx.compile(lambda grads, max_norm: dc.clip_grad_norm(grads, max_norm)[0])
    grads = {"w": normal((40,), world.rank)}
    for max_norm in (0.5, 2.0, math.inf):
        assert_close(clip(grads, mx.array(max_norm))["w"], wide(dc.clip_grad_norm(grads, max_norm)[0]["w"]))


@pytest.mark.parametrize("stream", [mx.cpu, mx.Device(mx.cpu)], ids=["type", "device"])
def test_a_stream_can_be_named(stream: Any, world: dc.World) -> None:
    grads = {"w": normal((40,), world.rank), "n": mx.array([1, 2])}
    expected, norm = dc.clip_grad_norm(grads, 0.5)
    clipped, same_norm = dc.clip_grad_norm(grads, 0.5, stream=stream, nonfinite="zero")
    assert norm.item() == same_norm.item()
    others = dc.clip_grads_with_norm(grads, 0.5, norm, stream=stream)
    for name in grads:
        assert np.array_equal(np.array(clipped[name]), np.array(expected[name]))
        assert np.array_equal(np.array(others[name]), np.array(expected[name]))
    assert_close(dc.clip_grad_value(grads, 0.1, stream=stream)["w"], np.clip(wide(grads["w"]), -0.1, 0.1))


@alone
def test_the_tree_keeps_its_order_and_its_containers() -> None:
    grads = {"z": [mx.ones(1), (mx.ones(2), {"y": mx.ones(3)})], "a": mx.ones(4)}
    clipped, _ = dc.clip_grad_norm(grads, 0.1)
    assert list(clipped) == ["z", "a"]
    assert isinstance(clipped["z"], list)
    assert isinstance(clipped["z"][1], tuple)
    paths: Any = tree_flatten(clipped)
    expected: Any = tree_flatten(grads)
    assert [path for path, _ in paths] == [path for path, _ in expected]


def test_a_norm_beyond_float32_of_finite_values_is_said_so() -> None:
    with pytest.raises(FloatingPointError, match="every value is finite, but their norm does not fit float32"):
        dc.clip_grad_norm({"a": mx.array([3e38]), "b": mx.array([3e38])}, 1.0, nonfinite="raise")


def test_the_largest_magnitude_blames_no_square() -> None:
    grads = {"big": mx.full((3000,), 1e30), "bad": mx.array([math.nan])}
    with pytest.raises(FloatingPointError) as raised:
        dc.clip_grad_norm(grads, 1.0, norm_type=math.inf, nonfinite="raise")
    assert "'bad' (1 NaN)" in str(raised.value)
    assert "big" not in str(raised.value)
