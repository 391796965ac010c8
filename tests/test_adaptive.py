"""Adaptive clipping, unit by unit, against NumPy: whole arrays, and rows and columns that are sharded."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear
from reference import EPSILON, FLOATS, WORLD, Array, assert_close, line, normal, wide

import distclip as dc

N = WORLD.size

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (12, 24),
    "convolution": (24, 3, 3, 12),
    "1-D convolution": (12, 5, 12),
    "bias": (24,),
    "scalar": (),
    "embedding": (36, 12),
}


def reference(grad: Array, weight: Array, clipping: float, eps: float = 1e-3) -> Array:
    """The paper's rule in float64; outputs come first."""
    axes = tuple(range(1, grad.ndim)) if grad.ndim > 1 else None
    weights, norm = (np.sqrt(np.square(x).sum(axis=axes, keepdims=grad.ndim > 1)) for x in (weight, grad))
    most = clipping * np.maximum(weights, eps)
    return np.where(norm > most, grad * most / np.maximum(norm, 1e-6), grad)


@pytest.mark.parametrize("clipping", [0.01, 0.7, 100.0])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_each_unit_is_limited_by_its_weights(dtype: mx.Dtype, clipping: float) -> None:
    weights = {name: normal(shape, i, dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    grads = {name: normal(shape, 50 + i, dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    clipped = dc.adaptive_clip_grad(grads, weights, clipping)
    for name, found in clipped.items():
        assert found.dtype == dtype
        truth = reference(wide(grads[name]), wide(weights[name]), clipping)
        assert_close(found, truth, rtol=4 * EPSILON[dtype])


@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_rows_and_columns_give_the_whole_result(dim: int) -> None:
    weight, grad = normal((12, 24), 1), normal((12, 24), 2)
    bias, bias_grad = normal((24,), 3), normal((24,), 4)
    whole = dc.adaptive_clip_grad({"w": grad, "b": bias_grad}, {"w": weight, "b": bias}, 0.3)

    def mine(x: mx.array, dim: int) -> mx.array:
        return mx.split(x, N, axis=dim)[WORLD.rank]

    line()
    layout = {"w": dc.Sharded("x", dim=dim), "b": dc.Sharded(dim=0)}
    grads, weights = {"w": mine(grad, dim), "b": mine(bias_grad, 0)}, {"w": mine(weight, dim), "b": mine(bias, 0)}
    clipped = dc.adaptive_clip_grad(grads, weights, 0.3, layout=layout)
    assert_close(clipped["w"], wide(mine(whole["w"], dim)), rtol=1e-6)
    assert_close(clipped["b"], wide(mine(whole["b"], 0)), rtol=1e-6)


def test_the_layout_of_a_model_says_which_dimension_is_cut() -> None:
    up = shard_linear(nn.Linear(12, 24), "all-to-sharded", group=WORLD.group)
    down = shard_linear(nn.Linear(24, 12), "sharded-to-all", group=WORLD.group)
    layout = dc.layout_of(nn.Sequential(up, down))["layers"]
    assert (layout[0]["weight"].dim, layout[0]["bias"].dim, layout[1]["weight"].dim) == (0, 0, 1)
    assert layout[1]["bias"] == dc.Replicated()
    if N > 1:  # alone, nothing is sharded
        full = dc.layout_of(nn.fully_shard(nn.Linear(24, 12), group=WORLD.group))
        assert {placement.dim for placement in full["module"].values()} == {0}


def test_it_can_be_compiled_and_takes_modules() -> None:
    model = nn.Linear(6, 4)
    grads = {"weight": normal((4, 6), 1), "bias": normal((4,), 2)}
    eager = dc.adaptive_clip_grad(grads, model, 0.05)
    compiled = mx.compile(lambda g, p: dc.adaptive_clip_grad(g, p, 0.05))(grads, model.parameters())
    for name, found in compiled.items():
        assert_close(found, wide(eager[name]), rtol=1e-6)


def test_a_unit_with_nan_is_nan_and_the_others_are_not() -> None:
    grad: Any = mx.array([[float("nan"), 1.0], [3.0, 4.0]])
    clipped = dc.adaptive_clip_grad({"w": grad}, {"w": mx.ones((2, 2))}, 1.0)["w"]
    assert mx.all(mx.isnan(clipped[0])).item()
    assert_close(clipped[1], wide(grad[1]) * (2**0.5 / 5), rtol=1e-6)


def test_what_cannot_be_right_is_said() -> None:
    grads = {"w": mx.ones((2, 2))}
    with pytest.raises(ValueError, match="clipping and eps should be > 0, 0"):
        dc.adaptive_clip_grad(grads, grads, 0)
    with pytest.raises(ValueError, match="'w' has a gradient of shape"):
        dc.adaptive_clip_grad(grads, {"w": mx.ones((2, 3))})
    with pytest.raises(dc.LayoutError, match=r"'w' is called .* which dimension is cut"):
        dc.adaptive_clip_grad(grads, grads, layout=dc.Sharded())
