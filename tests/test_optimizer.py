"""A skipped step leaves no trace: parameters, optimizer state and threshold are those of a run that never saw it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from reference import DTYPES, WORLD, alone, assert_close, leaves, normal, same_bits, told_by_all, wide
from schemes import BAD, EXACT, NATIVE, SCHEMES, N, Scheme, bits, every_scheme, in_order

import distclip as dc
from distclip.engine import kernels


def several_optimizers() -> Any:
    return optim.MultiOptimizer(
        [optim.Muon(1e-2), optim.AdamW(optim.linear_schedule(1e-2, 1e-3, 5)), optim.SGD(0.1, momentum=0.5)],
        [lambda path, x: "w" in path, lambda path, x: path == "r"],
    )


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optim.SGD(0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda: optim.AdamW(optim.cosine_decay(1e-2, 8), bias_correction=True),
    "Adafactor": lambda: optim.Adafactor(),
    "Lion": lambda: optim.Lion(optim.step_decay(1e-2, 0.5, 2), weight_decay=0.1),
    "Muon": lambda: optim.Muon(1e-2),
    "RMSprop": lambda: optim.RMSprop(1e-2),
    "MultiOptimizer": several_optimizers,
}
THRESHOLDS: dict[str, Any] = {
    "AutoClip": dc.AutoClip(percentile=10, history=3),
    "ZClip": dc.ZClip(warm_up=2),
    "AdaGC": dc.AdaGC(warm_up=2),
    "a schedule": optim.cosine_decay(0.5, 10),
}
STEPS = [0, 1, 0, 2]  # so that a norm rises, whatever the norms are


def trained(
    scheme: Scheme, optimizer: Any, max_norm: Any, batches: list[Any], compiled: bool = False
) -> tuple[Any, Any]:
    """The parameters and the optimizer after some gradients, in place of a number that of its step."""
    parameters = scheme.parameters()
    clipped = dc.ClippedOptimizer(optimizer, dc.Clipper(max_norm, check="never", **scheme.options()))
    clipped.init(parameters)
    box = [parameters, clipped.state]

    def step(grads: Any) -> None:
        box[0].update(clipped.apply_gradients(grads, box[0]))

    run: Any = partial(mx.compile, inputs=box, outputs=box)(step) if compiled else step
    for batch in batches:
        run(scheme.grads(batch) if isinstance(batch, int) else batch)
        mx.eval(box)
    return parameters, clipped


def with_bad_steps(scheme: Scheme) -> list[Any]:
    """The steps, with a NaN of the last rank and an infinity of the first between them."""
    first, *rest = STEPS
    return [first, scheme.spoiled(7, math.nan, N - 1), *rest[:1], scheme.spoiled(8, math.inf, 0), *rest[1:]]


def assert_same_run(scheme: Scheme, optimizer: Callable[[], Any], max_norm: Any, compiled: bool) -> None:
    expected, clean = trained(scheme, optimizer(), max_norm, list(STEPS), compiled)
    parameters, spoiled = trained(scheme, optimizer(), max_norm, with_bad_steps(scheme), compiled)
    assert bits(parameters) == bits(expected)
    assert bits(spoiled.state["optimizer"]) == bits(clean.state["optimizer"])
    assert bits(spoiled.clipper.state["threshold"]) == bits(clean.clipper.state["threshold"])
    found = {name: spoiled.clipper.state[name].item() for name in ("step", "bad", "in_a_row")}
    assert found == {"step": len(STEPS) + 2, "bad": 2, "in_a_row": 0}
    assert spoiled.clipper.state["clipped"].item() == clean.clipper.state["clipped"].item() > 0
    assert all(np.isfinite(wide(leaf)).all() for leaf in leaves(parameters))
    assert same_bits(spoiled.clipper.state)
    if scheme.blocks == 1:
        assert same_bits(in_order([parameters, spoiled.state["optimizer"]]))  # MLX merges trees in any order
    elif scheme.replicas == 1:
        assert same_bits(parameters["r"])


@every_scheme
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_goes_on_as_if_it_had_not_seen_the_bad_batch(optimizer: Any, scheme: Scheme) -> None:
    assert_same_run(scheme, optimizer, 0.5, compiled=False)


@every_scheme
@pytest.mark.parametrize("max_norm", THRESHOLDS.values(), ids=THRESHOLDS)
def test_thresholds_wait_too(max_norm: Any, scheme: Scheme) -> None:
    assert_same_run(scheme, OPTIMIZERS["AdamW"], max_norm, compiled=False)


@pytest.mark.parametrize(
    ("scheme", "optimizer", "max_norm"),
    [
        ("averaged", "AdamW", "AutoClip"),
        pytest.param("mixed", "SGD", "a schedule", marks=alone),
        pytest.param("sharded", "Adafactor", "ZClip", marks=alone),
        pytest.param("averaged", "MultiOptimizer", "AdaGC", marks=alone),
        pytest.param("on a mesh", "Lion", "AutoClip", marks=pytest.mark.mpi(min_size=4)),
    ],
)
def test_so_does_a_compiled_run(scheme: str, optimizer: str, max_norm: str) -> None:
    assert_same_run(SCHEMES[scheme], OPTIMIZERS[optimizer], THRESHOLDS[max_norm], compiled=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_first_step_leaves_a_fresh_optimizer(value: float, optimizer: Any) -> None:
    scheme = SCHEMES["averaged"]
    parameters, clipped = trained(scheme, optimizer(), 0.5, [scheme.spoiled(3, value, 0)])
    expected, clean = trained(scheme, optimizer(), 0.5, [])
    assert bits(parameters) == bits(expected)
    assert bits(clipped.state["optimizer"]) == bits(clean.state["optimizer"])


@pytest.mark.parametrize("size", [30, 3000])
def test_a_huge_value_is_clipped_or_skipped_by_all(size: int, world: dc.World) -> None:
    optimizer = dc.ClippedOptimizer(optim.SGD(0.1, momentum=0.9), dc.Clipper(1.0))
    grads = {"w": normal((size,), world.rank)}
    if world.rank == N - 1:
        grads["w"][7] = 1e30
    parameters = optimizer.apply_gradients(grads, {"w": mx.zeros(size)})
    fits = EXACT or size < 1024  # small leaves are summed in float64 by every engine
    assert optimizer.step.item() == int(fits)
    assert parameters["w"].max().item() == pytest.approx(0.0, abs=1e-20)
    assert parameters["w"][7].item() == pytest.approx(-0.1 if fits and world.rank == N - 1 else 0.0, abs=1e-6)
    assert same_bits(optimizer.clipper.state)


@pytest.mark.parametrize("policy", ["zero", "propagate", "raise"])
def test_other_policies_update_as_their_gradients_say(policy: str, world: dc.World) -> None:
    optimizer = dc.ClippedOptimizer(optim.SGD(0.1, momentum=0.5), dc.Clipper(1.0, nonfinite=policy))
    parameters = {"w": mx.ones(2)}
    parameters = optimizer.apply_gradients({"w": mx.array([0.25, 0.5]) * (1 + world.rank)}, parameters)
    bad = {"w": mx.array([1.0, math.nan if world.rank == 0 else 1.0])}
    if policy == "raise":
        before = bits([parameters, optimizer.state])
        with pytest.raises(FloatingPointError, match="rank 0: 'w' "):
            optimizer.apply_gradients(bad, parameters)
        assert bits([parameters, optimizer.state]) == before
        return
    speed = optimizer.state["optimizer"]["w"]["v"]
    after = optimizer.apply_gradients(bad, parameters)
    assert optimizer.step.item() == 2
    if policy == "zero":
        assert_close(after["w"], wide(parameters["w"]) - 0.1 * 0.5 * wide(speed))
    else:
        assert np.isnan(wide(after["w"])).all()


def test_too_many_bad_steps_end_the_run_on_every_rank(world: dc.World) -> None:
    optimizer = dc.ClippedOptimizer(optim.Adam(0.1), dc.Clipper(1.0, max_consecutive_skips=2))
    parameters = {"w": mx.ones(2)}
    for _ in range(3):
        bad = {"w": mx.array([1.0 + world.rank, math.inf if world.rank == 0 else 1.0])}
        parameters = optimizer.apply_gradients(bad, parameters)
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 3") as error:
        optimizer.apply_gradients({"w": mx.ones(2)}, parameters)
    assert len(set(told_by_all(str(error.value)))) == 1
    assert bits(parameters) == bits({"w": mx.ones(2)})
    assert (optimizer.step.item(), optimizer.clipper.state["bad"].item()) == (0, 3)


# ------------------------------------------------------------------------------------------ the interface


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 4), nn.Linear(4, 1, bias=False)]
        self.unused = nn.Linear(2, 2)

    def __call__(self, x: mx.array) -> Any:
        return self.layers[1](nn.relu(self.layers[0](x)))


def net() -> Net:
    mx.random.seed(4)
    return Net()


def batch(i: int) -> mx.array:
    return normal((5, 3), (WORLD.rank, i))


def grads_of(model: Any, x: mx.array) -> Any:
    return nn.value_and_grad(model, lambda x: (model(x) - x.sum(1, keepdims=True)).square().mean())(x)[1]


def averaged(optimizer: Any, **options: Any) -> dc.ClippedOptimizer:
    return dc.ClippedOptimizer(optimizer, dc.Clipper(0.3, average=True, **options))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_bad_steps_it_is_clipping_and_the_optimizer(optimizer: Any) -> None:
    model, other, plain, clipped = net(), net(), optimizer(), averaged(optimizer())
    for i in range(3):
        grads, norm = dc.average_and_clip(grads_of(other, batch(i)), 0.3)
        plain.update(other, grads)
        clipped.update(model, grads_of(model, batch(i)))
        assert clipped.report.norm.item() == norm.item()
        mx.eval(model.parameters(), other.parameters())
    assert bits(model.parameters()) == bits(other.parameters())
    assert bits(clipped.state["optimizer"]) == bits(plain.state)


@pytest.mark.parametrize("inited", [True, False], ids=["after init", "before init"])
def test_frozen_parameters_and_those_without_gradient_stay(inited: bool) -> None:
    model, optimizer = net(), averaged(optim.Adam(0.1))
    model.layers[0].freeze()
    frozen = bits([model.layers[0], model.unused])
    if inited:
        optimizer.init(model.trainable_parameters())
    for i in range(3):
        grads = grads_of(model, batch(i))
        del grads["unused"]
        optimizer.update(model, tree_map(lambda g: g * math.nan, grads) if i == 1 else grads)
    assert bits([model.layers[0], model.unused]) == frozen
    assert optimizer.step.item() == 2
    assert optimizer.clipper.state["bad"].item() == 1
    assert same_bits(model.parameters())


@alone
@pytest.mark.parametrize("container", [list, tuple, lambda x: {"a": x[0], "b": x[1]}], ids=["list", "tuple", "dict"])
def test_trees_of_every_container(container: Any) -> None:
    parameters = {"w": container([mx.ones(2), mx.ones((2, 2))]), "left alone": mx.ones(1)}
    grads = {"w": container([mx.ones(2), mx.ones((2, 2))])}
    optimizer = dc.ClippedOptimizer(optim.SGD(0.1, momentum=0.9), dc.Clipper(1.0))
    optimizer.init(parameters)
    after = optimizer.apply_gradients(grads, parameters)
    before = bits([after, optimizer.state["optimizer"]])
    same = optimizer.apply_gradients(tree_map(lambda g: g * math.nan, grads), after)
    assert bits([same, optimizer.state["optimizer"]]) == before
    assert type(same["w"]) is type(grads["w"])
    assert "left alone" not in same


@alone
def test_a_single_array_is_a_tree() -> None:
    optimizer = dc.ClippedOptimizer(optim.SGD(1.0), dc.Clipper(1.0))
    optimizer.optimizer.state.update({})
    model = nn.Linear(2, 1, bias=False)
    before = wide(model.weight)
    optimizer.update(model, {"weight": mx.array([[3.0, 4.0]])})
    assert_close(model.weight, before - [[0.6, 0.8]], 1e-5)


@alone
def test_learning_rate_step_and_state_are_the_optimizers() -> None:
    optimizer = averaged(optim.AdamW(1e-2))
    assert optimizer.learning_rate.item() == pytest.approx(1e-2)
    optimizer.learning_rate = 1e-3
    assert optimizer.optimizer.learning_rate.item() == pytest.approx(1e-3)
    assert optimizer.report is None
    model = net()
    optimizer.update(model, grads_of(model, batch(0)))
    assert optimizer.step.item() == optimizer.optimizer.step.item() == 1
    optimizer.learning_rate = mx.array(0.0)
    before = bits(model.parameters())
    optimizer.update(model, grads_of(model, batch(1)))
    assert bits(model.parameters()) == before
    several = averaged(several_optimizers())
    several.learning_rate = 0.5
    assert several.learning_rate.item() == 0.5
    assert len(several.state["optimizer"]["states"]) == 3


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "MultiOptimizer"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer: str, at: int, tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        clipper = dc.Clipper(dc.ZClip(warm_up=2), average=True, rank_batch=5)
        return net(), dc.ClippedOptimizer(OPTIMIZERS[optimizer](), clipper)

    def go_on(model: Any, clipped: Any, steps: range) -> None:
        for i in steps:
            grads = grads_of(model, batch(i))
            clipped.update(model, tree_map(lambda g: g * math.nan, grads) if i in (2, 4) else grads)
            mx.eval(model.parameters(), clipped.state)

    whole = make()
    go_on(*whole, range(6))
    model, clipped = make()
    go_on(model, clipped, range(at))
    saved: Any = tree_flatten({"model": model.parameters(), "optimizer": clipped.state})
    mx.save_safetensors(str(tmp_path / "all.safetensors"), dict(saved))
    arrays: Any = tree_unflatten(list(mx.load(str(tmp_path / "all.safetensors")).items()))  # type: ignore[union-attr]
    model, clipped = make()
    clipped.init(model.trainable_parameters())
    model.update(arrays["model"])
    clipped.state = arrays["optimizer"]
    go_on(model, clipped, range(at, 6))
    assert bits(model.parameters()) == bits(whole[0].parameters())
    assert bits(clipped.state) == bits(whole[1].state)


def test_a_compiled_training_step() -> None:
    model, optimizer = net(), averaged(optim.AdamW(optim.cosine_decay(1e-2, 10)), check="never", rank_batch=5)
    eager_model, eager = net(), averaged(optim.AdamW(optim.cosine_decay(1e-2, 10)), check="never", rank_batch=5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> Any:
        optimizer.update(model, grads_of(model, x))
        return optimizer.report.arrays

    for i in range(4):
        x = batch(i) * (math.nan if i == 2 else 1.0)
        arrays: Any = step(x)
        mx.eval(state, arrays)
        eager.update(eager_model, grads_of(eager_model, x))
        assert optimizer.clipper.report(arrays).to_dict()["skipped"] == (i == 2)
        optimizer.clipper.settle()
    assert (optimizer.step.item(), optimizer.clipper.state["step"].item()) == (3, 4)
    for a, b in zip(leaves(model.parameters()), leaves(eager_model.parameters()), strict=True):
        np.testing.assert_allclose(wide(a), wide(b), rtol=1e-4, atol=1e-6)
    assert same_bits([state, arrays])


def test_the_old_parameters_and_gradients_of_the_user_are_not_changed() -> None:
    optimizer = averaged(optim.SGD(0.1, momentum=0.9))
    parameters, grads = {"w": normal((500, 3), 1)}, {"w": normal((500, 3), (WORLD.rank, 2))}
    for bad in (False, True, False):
        given = tree_map(lambda g: g * math.nan, grads) if bad else grads
        kept = [parameters, given, tree_map(lambda x: x, optimizer.state)]
        before = bits(kept)
        parameters = optimizer.apply_gradients(given, parameters)
        mx.eval(parameters, optimizer.state)
        assert bits(kept) == before


def test_a_skip_keeps_the_types_of_mixed_parameters() -> None:
    parameters = {"h": normal((4,), 1, mx.bfloat16), "f": normal((3,), 2)}
    optimizer = averaged(optim.AdamW(1e-2))
    for value in (1.0, math.nan):
        after = optimizer.apply_gradients(tree_map(lambda p, v=value: p * v, parameters), parameters)
        assert {name: leaf.dtype for name, leaf in after.items()} == {"h": mx.bfloat16, "f": mx.float32}
        assert (bits(after) == bits(parameters)) == math.isnan(value)
        parameters = after


# ------------------------------------------------------------------------------------------- kernels.select


def chosen(keep: bool, updated: list[mx.array], old: list[mx.array]) -> list[mx.array]:
    return kernels.select(mx.array(keep), updated, old, mx.cpu)


VIEWS: dict[str, Callable[[mx.array], mx.array]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.T,
    "every second": lambda x: x[::2, 1:],
    "reversed": lambda x: x[::-1],
    "a row for all": lambda x: mx.broadcast_to(x[0], (7, x.shape[1])),
    "0-d": lambda x: x[1, 2],
    "empty": lambda x: x[3:3],
    "1-D": lambda x: x.reshape(-1)[3:50],
}


@alone
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), mx.uint64, mx.int8], ids=str)
def test_one_of_two_arrays_is_chosen_bit_for_bit(dtype: mx.Dtype, view: Any) -> None:
    with mx.stream(mx.cpu):
        plain, other = normal((60, 50), 1, dtype)[:9, :11], normal((60, 50), 2, dtype)[20:29, :11]
        pairs = [(view(a), view(b)) for a, b in ((plain, other), (other, plain))]
        pairs.append((mx.contiguous(view(plain)), view(other)))
        for a, b in pairs:
            for keep in (True, False):
                (found,) = chosen(keep, [a], [b])
                assert (found.dtype, found.shape) == (a.dtype, a.shape)
                assert bits([found]) == bits([a if keep else b])
                (again,) = mx.compile(chosen_by)(mx.array(keep), [a], [b])
                assert bits([again]) == bits([a if keep else b])


def chosen_by(condition: mx.array, updated: list[mx.array], old: list[mx.array]) -> list[mx.array]:
    return kernels.select(condition, updated, old, mx.cpu)


@alone
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.float64], ids=str)
def test_every_pattern_is_kept(dtype: mx.Dtype) -> None:
    with mx.stream(mx.cpu):
        raw = mx.array(np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32))  # NaN of every kind among them
        a, b = raw.view(dtype), (raw ^ 0x5A5A5A5A).view(dtype)
        for keep in (True, False):
            assert bits(chosen(keep, [a], [b])) == bits([a if keep else b])


def address(x: mx.array) -> int:
    return int(np.array(x.view(mx.uint8), copy=False).ctypes.data)


@alone
@pytest.mark.skipif(not NATIVE, reason="MLX operations make a new array")
@pytest.mark.parametrize("keep", [True, False])
def test_an_array_that_nothing_else_holds_is_taken_over(keep: bool) -> None:
    updated, old = [normal((300, 200), 1), normal((300, 200), 2).T], [normal((300, 200), 3), normal((200, 300), 4)]
    expected = bits(updated if keep else old)
    mx.eval(updated, old)
    places = [address(x) for x in updated]
    held = updated[:]
    del held
    arrays = [updated.pop(0), updated.pop(0)]
    found = chosen(keep, arrays, old)
    del arrays
    mx.eval(found)
    assert [address(x) for x in found] == places
    assert bits(found) == expected


@alone
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_still_held_is_not_written(keep: bool) -> None:
    for hold in (lambda x: x, lambda x: x[3:], lambda x: x.T, lambda x: x * 2, lambda x: np.array(x, copy=False)):
        updated, old = normal((300, 200), 1), normal((300, 200), 2)
        mx.eval(updated, old)
        before = np.array(hold(mx.array(updated))), np.array(old)
        kept = hold(updated)
        arrays = [updated]
        del updated
        found = chosen(keep, arrays, [old])
        del arrays
        mx.eval(found)
        assert np.array_equal(np.array(kept), before[0])
        assert np.array_equal(np.array(old), before[1])


@alone
def test_choosing_between_an_array_and_itself() -> None:
    x = normal((100,), 1)
    for keep in (True, False):
        assert bits(chosen(keep, [x, x[:50]], [x, x[50:]])) == bits([x, x[:50] if keep else x[50:]])


@alone
@pytest.mark.parametrize("keep", [True, False])
def test_choosing_can_be_transformed(keep: bool) -> None:
    x, weights = normal((6, 5), 1), normal((6, 5), 2)

    def function(a: mx.array, b: mx.array) -> mx.array:
        return (kernels.select(mx.array(keep), [a * a], [3 * b], mx.cpu)[0] * weights).sum()

    for compiled in (False, True):
        f: Any = mx.compile(function) if compiled else function
        by_a, by_b = mx.grad(f, argnums=(0, 1))(x, x)
        assert_close(by_a, wide(2 * x * weights) * keep)
        assert_close(by_b, wide(3 * weights) * (not keep))
    tangent = mx.jvp(function, [x, x], [weights, weights])[1][0]
    expected = (2 * x * weights * weights if keep else 3 * weights * weights).sum()
    assert tangent.item() == pytest.approx(expected.item(), rel=1e-5)
    conditions = mx.array([True, False, keep])
    rows = mx.vmap(lambda c, a, b: kernels.select(c, [a], [b], mx.cpu)[0], in_axes=(0, 0, None))(
        conditions, x[:3], weights[0]
    )
    assert bits([rows]) == bits([mx.where(conditions[:, None], x[:3], weights[0])])
