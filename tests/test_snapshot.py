"""A skipped step is undone for any optimizer: what it updates in place, makes, replaces, removes or counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from reference import alone, leaves, normal, same_bits, wide
from schemes import bits, in_order

import distclip as dc
from distclip.engine import kernels


class Custom(optim.Optimizer):
    def __init__(self) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", 0.1)

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["m"] = mx.zeros_like(parameter)

    def stepped(self, parameter: mx.array, by: mx.array) -> mx.array:
        rate: mx.array = self.learning_rate
        return parameter - rate.astype(parameter.dtype) * by


class StateInPlace(Custom):
    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        m = state["m"]
        m *= 0.9
        m += gradient
        return self.stepped(parameter, m)


class ParameterInPlace(Custom):
    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        parameter -= self.learning_rate * (gradient + 0.1 * parameter)
        return parameter


class NewContainers(Custom):
    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["list"], state["dict"] = [mx.zeros_like(parameter)], {"a": {"b": mx.zeros_like(parameter)}}

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["list"] = [0.9 * state["list"][0] + gradient]
        state["dict"] = {"a": {"b": 0.9 * state["dict"]["a"]["b"] + gradient}}
        return self.stepped(parameter, state["list"][0] + state["dict"]["a"]["b"])


class Pair(NamedTuple):
    m: mx.array
    v: mx.array


class Tuples(Custom):
    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["pair"], state["both"] = Pair(mx.zeros_like(parameter), mx.zeros_like(parameter)), (mx.array(0.0), None)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        m, v = state["pair"]
        state["pair"], state["both"] = Pair(0.9 * m + gradient, v + gradient.square()), (state["both"][0] + 1, None)
        return self.stepped(parameter, state["pair"].m / (mx.sqrt(v) + 1))


class Constants(Custom):
    """Values that do not change: text, None and arrays, some of them quantized."""

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state.update(kind="sgd", nothing=None, codes=mx.zeros(parameter.shape, mx.uint8), scale=mx.array(0.1))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        m = 0.9 * (state["codes"].astype(mx.float32) - 128) * state["scale"] + gradient
        state["scale"] = mx.maximum(mx.abs(m).max() / 127, 1e-8)
        state["codes"] = (mx.round(m / state["scale"]) + 128).astype(mx.uint8)
        return self.stepped(parameter, m)


class MadeInFirstUpdate(Custom):
    def init_single(self, parameter: mx.array, state: Any) -> None:
        pass

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["m"] = 0.9 * state.get("m", mx.ones_like(parameter)) + gradient
        return self.stepped(parameter, state["m"])


class Numbers(Custom):
    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["count"], state["config"] = 0, {"beta": 0.9, "nesterov": False}

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["count"] += 1
        return self.stepped(parameter, gradient * state["count"])


class History(Custom):
    """A list that grows, and a key that is removed."""

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["history"], state["first"] = [], mx.ones_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["history"].append(gradient)
        state["history"] = state["history"][-2:]
        return self.stepped(parameter, sum(state["history"], state.pop("first", mx.array(0.0))))


class Shapes(Custom):
    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["rows"] = mx.zeros((1, *parameter.shape))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["rows"] = mx.concatenate([state["rows"][-2:], gradient[None]])
        return self.stepped(parameter, state["rows"].sum(0))


class Opaque(Custom):
    """An object that changes in itself."""

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["memory"] = np.zeros(1)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        state["memory"] += 1
        return self.stepped(parameter, gradient * float(state["memory"][0]))


class Factored(Custom):
    """Raises where it meets a NaN."""

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state["left"] = 1e-3 * mx.eye(parameter.shape[0])

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        flat = gradient.reshape(gradient.shape[0], -1)
        state["left"] = state["left"] + flat @ flat.T
        u, d, vt = mx.linalg.svd(state["left"], stream=mx.cpu)
        return self.stepped(parameter, (((u * mx.rsqrt(d)) @ vt) @ flat).reshape(gradient.shape))


def several() -> Any:
    parts = [StateInPlace(), optim.MultiOptimizer([MadeInFirstUpdate(), Tuples()], [lambda path, x: x.ndim == 1])]
    return optim.MultiOptimizer(parts, [lambda path, x: path == "w"])


class Lookahead:
    """A wrapper that is no Optimizer of MLX: slow weights that follow the fast ones, in a state made anew each time."""

    def __init__(self) -> None:
        self.fast = optim.Adam(0.1)
        self.slow: dict[str, Any] = {"weights": None, "steps": mx.array(0)}

    @property
    def state(self) -> Any:
        return {"fast": self.fast.state, "slow": self.slow}

    @property
    def step(self) -> Any:
        return self.slow["steps"]

    def init(self, parameters: Any) -> None:
        self.fast.init(parameters)
        self.slow["weights"] = tree_map(mx.array, parameters)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        fast = self.fast.apply_gradients(gradients, parameters)
        self.slow["steps"] = self.slow["steps"] + 1
        now = self.slow["steps"] % 2 == 0
        self.slow["weights"] = tree_map(lambda s, f: mx.where(now, s + 0.5 * (f - s), s), self.slow["weights"], fast)
        return tree_map(lambda s, f: mx.where(now, s, f), self.slow["weights"], fast)


LAZY: dict[str, Callable[[], Any]] = {
    "Lookahead": Lookahead,
    **{kind.__name__: kind for kind in (StateInPlace, ParameterInPlace, NewContainers, Tuples, Constants, Factored)},
    **{
        kind.__name__: partial(kind, 1e-2)
        for kind in (mlx_optimizers.DiffGrad, mlx_optimizers.Lamb, mlx_optimizers.MARS, mlx_optimizers.Muon)
    },
    "MADGRAD without momentum": lambda: mlx_optimizers.MADGRAD(1e-2, momentum=0),
}
HOST: dict[str, Callable[[], Any]] = {
    **{kind.__name__: kind for kind in (MadeInFirstUpdate, Numbers, History, Shapes)},
    **{
        kind.__name__: partial(kind, 1e-2)
        for kind in (mlx_optimizers.ADOPT, mlx_optimizers.MADGRAD, mlx_optimizers.QHAdam, mlx_optimizers.Shampoo)
    },
    "several": several,
}
BUILT_IN: dict[str, Callable[[], Any]] = {
    "Adam": lambda: optim.Adam(optim.linear_schedule(1e-2, 1e-3, 5), bias_correction=True),
    "AdaDelta": lambda: optim.AdaDelta(0.1),
    "Adagrad": lambda: optim.Adagrad(0.1),
    "Adamax": lambda: optim.Adamax(0.1),
}


def tree(step: int) -> dict[str, Any]:
    return {"w": normal((3, 4), (step, 1)), "layers": [{"b": normal((5,), (step, 2)), "k": normal((2, 2), (step, 3))}]}


def clipping(optimizer: Any, **options: Any) -> dc.ClippedOptimizer:
    return dc.ClippedOptimizer(optimizer, dc.Clipper(0.5, layout=dc.Replicated(), check="never", **options))


def stepper(clipped: dc.ClippedOptimizer, parameters: Any, compiled: bool) -> Callable[[Any], None]:
    """What updates parameters in place by gradients, and evaluates."""
    box = [parameters, clipped.state]

    def update(gradients: Any) -> None:
        box[0].update(clipped.apply_gradients(gradients, box[0]))

    step: Any = partial(mx.compile, inputs=box, outputs=box)(update) if compiled else update

    def run(gradients: Any) -> None:
        step(gradients)
        mx.eval(box)

    return run


def run(make: Callable[[], Any], batches: list[Any], compiled: bool) -> tuple[Any, Any, list[str]]:
    """The parameters, the optimizer and the bits of both before and after each batch."""
    parameters, clipped = tree(0), clipping(make())
    clipped.init(parameters)
    step, seen = stepper(clipped, parameters, compiled), [described([parameters, clipped.optimizer.state])]
    for batch in batches:
        step(batch)
        seen.append(described([parameters, clipped.optimizer.state]))
    return parameters, clipped, seen


def described(tree: Any) -> str:
    """All of a tree, its arrays to the bit."""
    flat: Any = tree_flatten(tree)
    return repr(
        [
            (path, x.dtype, bits([x])) if isinstance(x, mx.array) else (path, x)
            for path, x in sorted(flat, key=lambda leaf: leaf[0])
        ]
    )


def bad(step: int, value: float = math.nan) -> Any:
    return tree_map(lambda g: g * value, tree(step))


def assert_bad_steps_leave_no_trace(make: Callable[[], Any], compiled: bool) -> None:
    good = [tree(step) for step in (1, 2, 3)]
    *_, (fresh, first, second, third) = run(make, good, compiled)
    parameters, clipped, seen = run(make, [bad(9), good[0], bad(8, math.inf), bad(7), good[1], good[2]], compiled)
    assert seen == [fresh, fresh, first, first, first, second, third]
    assert fresh != first != second
    assert clipped.clipper.state["bad"].item() == 3
    assert all(np.isfinite(wide(leaf)).all() for leaf in leaves(parameters))
    assert same_bits(in_order(parameters))  # MLX merges trees in any order


@pytest.mark.parametrize("make", [*LAZY.values(), *HOST.values(), *BUILT_IN.values()], ids=[*LAZY, *HOST, *BUILT_IN])
def test_a_bad_step_leaves_no_trace_in_any_optimizer(make: Any) -> None:
    assert_bad_steps_leave_no_trace(make, compiled=False)


@pytest.mark.parametrize("make", [*LAZY.values(), *BUILT_IN.values()], ids=[*LAZY, *BUILT_IN])
def test_nor_in_a_compiled_one_whose_state_keeps_its_places(make: Any) -> None:
    assert_bad_steps_leave_no_trace(make, compiled=True)


REFUSED = {
    "MadeInFirstUpdate": "makes 'w.m'",
    "Numbers": "changes 'w.count' from 0",
    "History": "makes 'w.history.0'",
    "Shapes": "changes the shape of 'w.rows'",
    "ADOPT": "changes 'w.c' from 0",
    "MADGRAD": "makes 'w.x0'",
    "QHAdam": "changes 'w.b1_w' from 0.0",
    "Shampoo": "changes 'w.update_step' from 0",
}


@alone
@pytest.mark.parametrize("name", REFUSED)
def test_a_compiled_one_that_could_not_be_undone_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(
        ValueError, match=f'since {name} {REFUSED[name]}.* in its state: pass nonfinite="zero" to Clipper'
    ):
        run(HOST[name], [tree(1)], compiled=True)
    parameters, clipped = tree(0), clipping(HOST[name](), nonfinite="zero")
    clipped.init(parameters)
    stepper(clipped, parameters, compiled=True)(tree(1))


@pytest.mark.parametrize("name", ["MadeInFirstUpdate", "ADOPT", "MADGRAD"])
def test_what_a_first_update_has_made_outside_can_be_compiled(name: str) -> None:
    def go(batches: list[Any]) -> Any:
        parameters, clipped = tree(0), clipping(HOST[name]())
        parameters.update(clipped.apply_gradients(tree(1), parameters))
        step = stepper(clipped, parameters, compiled=True)
        for batch in batches:
            step(batch)
        return described([parameters, clipped.optimizer.state])

    assert go([bad(5), tree(2), bad(6, math.inf)]) == go([tree(2)])


class Calls(Custom):
    """Counts its calls, here rather than in its state."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.held, self.calls = held, 0

    def init_single(self, parameter: mx.array, state: Any) -> None:
        state.update(self.held)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
        self.calls += 1
        return self.stepped(parameter, gradient)


@pytest.mark.parametrize("held", [{"count": 0}, {"memory": np.zeros(1)}, {"on": False}, {"many": {1}}], ids=str)
def test_a_bad_step_does_not_call_an_optimizer_whose_state_holds_more_than_arrays(held: Any) -> None:
    optimizer = Calls(**held)
    clipped = clipping(optimizer)
    parameters, size = tree(0), 3
    for step, called in ((bad(1), 0), (tree(1), size), (bad(2), size), (tree(2), 2 * size)):
        parameters = clipped.apply_gradients(step, parameters)
        assert optimizer.calls == called


@alone
@pytest.mark.parametrize("held", [{}, {"kind": "sgd", "of": ("ab", None)}], ids=["arrays", "text"])
def test_nothing_is_evaluated_for_an_optimizer_with_arrays_alone(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = dc.ClippedOptimizer(Calls(**held), dc.Clipper(0.5, check="never", max_consecutive_skips=None))
    parameters = clipped.apply_gradients(tree(1), tree(0))
    mx.eval(parameters, clipped.state)
    large = 1 << 22
    parameters["large"] = mx.zeros(large)
    clipped.init(parameters)
    mx.eval(parameters)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    after = clipped.apply_gradients({**tree(2), "large": mx.zeros(large) + 1.0}, parameters)
    assert mx.get_peak_memory() - before < large
    mx.eval(after)
    assert mx.get_peak_memory() - before >= large, "it sees an evaluation"


def test_a_step_whose_gradients_a_factorization_refuses_is_skipped() -> None:
    clipped = clipping(Factored())
    parameters = tree(0)
    for step in (bad(1), bad(2, math.inf), tree(1)):
        parameters = clipped.apply_gradients(step, parameters)
        mx.eval(parameters, clipped.state)
    assert clipped.step.item() == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_state_that_is_random_stays_as_it_was(compiled: bool) -> None:
    mx.random.seed(3)
    *_, seen = run(lambda: mlx_optimizers.Kron(1e-3), [tree(1), bad(2), bad(3), tree(4)], compiled)
    assert seen[0] != seen[1] == seen[2] == seen[3] != seen[4]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_parameters_that_an_update_makes_wider_keep_their_values(compiled: bool) -> None:
    """MLX makes float32 parameters of float16 ones and float32 gradients."""
    parameters = {"w": normal((5,), 1, mx.float16)}
    before = wide(parameters["w"])
    clipped = dc.ClippedOptimizer(optim.SGD(0.1, momentum=0.9), dc.Clipper(9.0, layout=dc.Replicated(), check="never"))
    clipped.init(parameters)
    step = stepper(clipped, parameters, compiled)
    for gradient, moved in ((math.nan, 0.0), (1.0, 0.1), (math.inf, 0.1), (0.0, 0.19)):
        step({"w": mx.full((5,), gradient)})
        np.testing.assert_allclose(wide(parameters["w"]), before - moved, atol=1e-6)
    assert parameters["w"].dtype == mx.float32


def test_a_leaf_without_a_gradient_is_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    clipped = clipping(StateInPlace())
    clipped.init(model.trainable_parameters())
    model.layers[0].freeze()
    state = clipped.optimizer.state["layers"][0]["weight"]
    untouched = state["m"]
    for value in (1.0, math.nan, 2.0):
        clipped.update(model, tree_map(lambda x, v=value: mx.ones_like(x) * v, model.trainable_parameters()))
        mx.eval(model.parameters(), clipped.state)
    if kernels.native_kernel(mx.cpu):
        assert state["m"] is untouched
    assert bits([state["m"]]) == bits([mx.zeros((2, 3))])
    assert clipped.step.item() == 2


@pytest.mark.parametrize("name", ["ADOPT", "History", "Tuples"])
def test_a_state_that_was_restored_is_undone_too(name: str) -> None:
    make = (LAZY | HOST)[name]
    parameters, first, _ = run(make, [tree(1), tree(2)], False)
    ends = []
    for batches in ([tree(3)], [bad(5), tree(3), bad(6)]):
        clipped = clipping(make())
        clipped.state = tree_map(lambda x: x, first.state)
        after = tree_map(lambda x: x, parameters)
        for batch in batches:
            after = clipped.apply_gradients(batch, after)
        ends.append(described([after, clipped.optimizer.state]))
    assert ends[0] == ends[1]


@alone
def test_parts_of_parts_are_initialized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped, calls = clipping(several()), []
    monkeypatch.setattr(
        optim.MultiOptimizer, "init", lambda self, tree, init=optim.MultiOptimizer.init: calls.append(init(self, tree))
    )
    parameters = tree(0)
    for step in (1, 2, 3):
        parameters = clipped.apply_gradients(tree(step), parameters)
    assert len(calls) == 2  # the outer one's and the inner one's


@alone
def test_an_error_of_the_optimizer_passes_through() -> None:
    class Fails(Custom):
        def apply_single(self, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        dc.ClippedOptimizer(Fails(), dc.Clipper()).apply_gradients(tree(1), tree(0))


def test_a_rank_whose_tree_is_empty_waits_for_no_one(world: dc.World) -> None:
    """One rank looks at the norm before its update, another does not: the collective is the same."""
    ours = world.rank == world.size - 1
    clipped = dc.ClippedOptimizer(Numbers(), dc.Clipper(0.5, check="never", max_consecutive_skips=None))
    parameters: Any = tree(0) if ours else {}
    seen = []
    for step in (tree(1), bad(2), tree(3)):
        parameters = clipped.apply_gradients(step if ours else {}, parameters)
        mx.eval(parameters, clipped.state)
        seen.append(described(parameters))
    assert clipped.clipper.state["bad"].item() == 1
    assert clipped.step.item() == 2
    assert not ours or seen[0] == seen[1] != seen[2]
