"""The order in which a backward pass makes gradients, by the native kernel and by MLX's drawing."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from reference import alone

from distclip.engine import graph, native

pytestmark = alone
LAYERS = 4


def gradients(*, compiled: bool = False) -> tuple[list[str], list[mx.array]]:
    """Of a chain of layers with an embedding that serves as the head too."""
    model: Any = nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(8, 8), nn.ReLU())])
    model.embedding = nn.Embedding(16, 8)
    mx.eval(model.parameters())

    def loss(model: Any, tokens: mx.array) -> Any:
        return model.embedding.as_linear(model(model.embedding(tokens))).square().mean()

    gradient = nn.value_and_grad(model, loss)
    function: Any = mx.compile(partial(gradient, model)) if compiled else partial(gradient, model)
    flat: Any = tree_flatten(function(mx.array([1, 2, 3]))[1])
    names, arrays = zip(*flat, strict=True)
    return list(names), list(arrays)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernel", [True, False], ids=["native", "drawing"])
def test_the_last_layers_come_first(kernel: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("the kernel was not built")
    names, arrays = gradients(compiled=compiled)
    order = graph.order_of_making(arrays)
    assert order is not None
    made = [names[i] for i in order]
    assert sorted(made) == sorted(names)
    layers = [int(name.split(".")[1]) for name in made if name.startswith("layers")]
    assert layers == sorted(layers, reverse=True)
    assert made[-1] == "embedding.weight", "its gradient has a part from each end of the model"


def test_reading_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, arrays = gradients()
    first = graph.order_of_making(arrays)
    assert first is not None
    assert graph.order_of_making(arrays) == first
    mx.eval(arrays[first[0]])
    assert graph.order_of_making(arrays) is not None


def test_arrays_with_values_have_no_order() -> None:
    _, arrays = gradients()
    mx.eval(arrays)
    assert graph.order_of_making(arrays) is None
    assert graph.order_of_making([]) is None


def test_messages_between_ranks_are_seen_until_they_have_passed() -> None:
    assert not graph.waits_for_messages([])
    assert not graph.waits_for_messages([mx.ones(3), mx.ones(3) * 2])
