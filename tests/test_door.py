"""The door of each public function: a gradient tree is taken apart once and put together once, and nothing is evaluated
after the first call on one rank."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from reference import alone
from schemes import N

import distclip as dc

walks: Counter[str] = Counter()


class Container(dict[str, Any]):
    """A part of a tree that counts how often something goes through it."""

    def items(self) -> Any:
        walks["items"] += 1
        return super().items()

    def values(self) -> Any:
        walks["values"] += 1
        return super().values()

    def __iter__(self) -> Iterator[str]:
        walks["iter"] += 1
        return super().__iter__()


def tree() -> dict[str, Any]:
    layers = [Container(w=mx.ones((4, 3)), b=mx.ones(3)) for _ in range(3)]
    return Container(layers=layers, head=mx.ones((3, 2)))


CONTAINERS = 4
LAYOUT = {"layers": dc.Replicated(), "head": dc.Replicated()}


def by_layer(path: str) -> str:
    return path.rpartition(".")[0]


def clipper(**options: Any) -> dc.Clipper:
    return dc.Clipper(dc.AdaGC(), average=True, layout=LAYOUT, groups=by_layer, loss_scale=2.0, rank_batch=2, **options)


CLIPPER, OPTIMIZER = clipper(), dc.ClippedOptimizer(optim.AdamW(1e-3), clipper())
PARAMETERS = {"layers": [{"w": mx.ones((4, 3)), "b": mx.ones(3)} for _ in range(3)], "head": mx.ones((3, 2))}
CALLS: dict[str, tuple[Callable[[Any], Any], int]] = {  # and how often it goes through each container
    "global_norm": (lambda grads: dc.global_norm(grads, layout=LAYOUT), 1),
    "clip_grad_norm": (lambda grads: dc.clip_grad_norm(grads, 1.0, layout=LAYOUT, nonfinite="zero"), 2),
    "average_gradients": (dc.average_gradients, 2),
    "average_and_clip": (lambda grads: dc.average_and_clip(grads, 1.0, layout=LAYOUT, nonfinite="raise"), 2),
    "Clipper": (lambda grads: CLIPPER(grads), 2),
    "ClippedOptimizer": (lambda grads: OPTIMIZER.apply_gradients(grads, PARAMETERS), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tree_is_taken_apart_once_and_put_together_once(name: str) -> None:
    call, times = CALLS[name]
    if name == "ClippedOptimizer":
        OPTIMIZER.init(PARAMETERS)
    for _ in range(3):  # the first call, which compares trees and checks the layout, and later ones
        walks.clear()
        mx.eval(call(tree()))
        assert walks.total() == times * CONTAINERS


ADAPTIVE = {"adaptive_clip_grad": (lambda grads: dc.adaptive_clip_grad(grads, tree(), 1.0, layout=LAYOUT), 0)}


@pytest.mark.parametrize("name", CALLS | ADAPTIVE)
def test_nothing_holds_the_gradient_after_a_call(name: str) -> None:
    """Not until Python looks for objects that hold each other either: each step would take memory of its own."""
    call, _ = (CALLS | ADAPTIVE)[name]

    def held() -> int:
        mx.eval(call(tree()))
        return sum(isinstance(thing, mx.array) for thing in gc.get_objects())

    held()
    gc.collect()
    gc.disable()
    try:
        assert held() == held()
    finally:
        gc.enable()


@alone
@pytest.mark.parametrize("name", [name for name in CALLS if name != "average_and_clip"])
def test_nothing_is_evaluated_after_the_first_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory shows an evaluation however it is asked for: the gradient is large and lazy."""
    large = 1 << 22

    def lazy() -> dict[str, Any]:
        return tree() | {"large": mx.zeros(large) + 1.0}

    layout, parameters = LAYOUT | {"large": dc.Replicated()}, PARAMETERS | {"large": mx.array(mx.ones(large))}
    service = dc.Clipper(1.0, layout=layout, groups=by_layer, max_consecutive_skips=None)
    optimizer = dc.ClippedOptimizer(optim.SGD(1e-3), dc.Clipper(1.0, layout=layout, max_consecutive_skips=None))
    optimizer.init(parameters)
    calls: dict[str, Callable[[Any], Any]] = {
        "global_norm": lambda grads: dc.global_norm(grads, layout=layout),
        "clip_grad_norm": lambda grads: dc.clip_grad_norm(grads, 1.0, layout=layout, nonfinite="zero"),
        "average_gradients": dc.average_gradients,
        "Clipper": service,
        "ClippedOptimizer": lambda grads: optimizer.apply_gradients(grads, parameters),
    }
    mx.eval(calls[name](lazy()), parameters, optimizer.state, service.state)
    evaluations = Counter[str]()
    for function in ("eval", "async_eval"):
        monkeypatch.setattr(mx, function, lambda *_, function=function: evaluations.update([function]))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    result = calls[name](lazy())
    assert mx.get_peak_memory() - before < large
    assert not evaluations
    monkeypatch.undo()
    mx.eval(result)
    assert mx.get_peak_memory() - before >= large, "it sees an evaluation"
    assert N == 1
