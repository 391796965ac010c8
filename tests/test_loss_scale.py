"""A scaled loss loses nothing, and its scale may change: with each call, or by itself."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from reference import alone, leaves, normal, same_bits, wide
from schemes import Scheme, bits, every_scheme

import distclip as dc

S = 2.0**15
SMALL = 1e-7  # float16 has nothing between 0 and 6e-8


@every_scheme
@pytest.mark.parametrize("options", [{}, {"nonfinite": "zero"}, {"groups": {"s": "s.*"}}], ids=str)
@pytest.mark.parametrize("max_norm", [1e9, 1e-8, dc.AdaGC(warm_up=1)], ids=["keeps", "clips", "AdaGC"])
def test_float16_gradients_lose_nothing(max_norm: Any, options: Any, scheme: Scheme) -> None:
    options = {**scheme.options(), **options}
    scaled, plain = dc.Clipper(max_norm, loss_scale=S, **options), dc.Clipper(max_norm, **options)
    for step in range(2):
        half = tree_map(lambda g: g.astype(mx.float16), scheme.grads(step, at=SMALL * S))
        clipped, report = scaled(half)
        expected, same = plain(tree_map(lambda g: g.astype(mx.float32) / S, half))
        np.testing.assert_allclose(wide(report.norm), wide(same.norm), rtol=1e-3)
        for a, b in zip(leaves(clipped), leaves(expected), strict=True):
            assert a.dtype == mx.float32
            np.testing.assert_allclose(wide(a), wide(b), rtol=4e-3, atol=2e-3 * float(np.abs(wide(b)).max()))
        assert all((wide(leaf) != 0).all() for leaf in leaves(clipped))


@alone
def test_other_types_are_kept() -> None:
    grads = {"b": normal((4,), 1, mx.bfloat16), "f": normal((4,), 2), "d": mx.array([1.0, 2.0], mx.float64)}
    with mx.stream(mx.cpu):
        clipped, report = dc.Clipper(1e9)(grads, loss_scale=8.0)
        assert {name: leaf.dtype for name, leaf in clipped.items()} == {name: g.dtype for name, g in grads.items()}
        assert report.loss_scale.item() == 8
    half, report = dc.Clipper(1e9)({"h": normal((4,), 1, mx.float16)})
    assert half["h"].dtype == mx.float16
    assert "loss_scale" not in report.to_dict()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_float16_parameters_stay_and_move_as_float32_ones_would(nonfinite: str, compiled: bool) -> None:
    parameters = {"w": mx.ones((300,), mx.float16)}
    clipper = dc.Clipper(1.0, layout=dc.Replicated(), nonfinite=nonfinite, check="never")
    clipped = dc.ClippedOptimizer(optim.Adam(1e-2, eps=1e-12), clipper)
    clipped.init(parameters)
    box = [parameters, clipped.state]

    def update(gradients: Any, scale: mx.array) -> None:
        box[0].update(clipped.apply_gradients(gradients, box[0], loss_scale=scale))

    step: Any = partial(mx.compile, inputs=box, outputs=box)(update) if compiled else update
    true = normal((300,), 1) * SMALL
    if nonfinite == "skip":
        step({"w": mx.full((300,), math.nan, mx.float16)}, mx.array(S))
        mx.eval(box)
        assert bits(parameters) == bits({"w": mx.ones((300,), mx.float16)})
    for scale in (S, S / 2):
        step({"w": (true * scale).astype(mx.float16)}, mx.array(scale))
        mx.eval(box)
    assert parameters["w"].dtype == mx.float16
    plain, expected = optim.Adam(1e-2, eps=1e-12), {"w": mx.ones((300,))}
    for _ in range(2):
        expected = plain.apply_gradients({"w": true}, expected)
    np.testing.assert_allclose(wide(parameters["w"]), wide(expected["w"]), atol=2e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("call", ["update", "apply_gradients"])
def test_a_scale_that_changes_goes_with_each_call(call: str, compiled: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    clipped = dc.ClippedOptimizer(optim.SGD(1.0), dc.Clipper(1e9, layout=dc.Replicated(), check="never"))
    clipped.init(model.trainable_parameters())
    state = [model.state, clipped.state]

    def step(grads: Any, scale: Any) -> Any:
        if call == "update":
            clipped.update(model, grads, loss_scale=scale)
        else:
            model.update(clipped.apply_gradients(grads, model, loss_scale=scale))
        return clipped.report.arrays  # type: ignore[union-attr]

    run: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    for i, scale in enumerate((8.0, 4.0, 2.0**20), 1):
        before = model.weight.item()
        arrays = run({"weight": mx.array([[scale]])}, mx.array(scale))
        mx.eval(state, arrays)
        assert arrays["norm"].item() == 1
        assert model.weight.item() == pytest.approx(before - 1, abs=1e-5)
        assert arrays["step"].item() == i


def test_an_array_that_the_clipper_has_is_read_in_each_call() -> None:
    scale = mx.array(8.0)
    clipper = dc.Clipper(1e9, loss_scale=scale, layout=dc.Replicated())
    for value in (8.0, 4.0):
        scale[...] = value
        assert clipper({"w": mx.array([3.0, 4.0]) * value})[1].norm.item() == 5
        assert clipper.loss_scale.item() == value  # type: ignore[union-attr]

    def clipped(grads: Any) -> Any:
        return clipper(grads)[0]

    compiled = mx.compile(clipped)
    with pytest.warns(RuntimeWarning, match="keeps the value that it has now.*with each call") as warned:
        compiled({"w": mx.array([3.0])})
    assert warned[0].filename == __file__
    dc.Clipper(1e9, loss_scale=2.0)({"w": mx.array([3.0])})


@pytest.mark.parametrize("value", [0.0, math.nan, 1e-45], ids=str)
def test_a_scale_that_makes_the_norm_bad_makes_the_step_bad(value: float) -> None:
    optimizer = dc.ClippedOptimizer(optim.SGD(1.0), dc.Clipper(1.0, layout=dc.Replicated()))
    after = optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)}, loss_scale=mx.array(value))
    assert bits(after) == bits({"w": mx.ones(3)})
    assert optimizer.clipper.state["bad"].item() == 1


# ------------------------------------------------------------------------------------------------- dynamic


def scales_of(outcomes: list[bool], initial: float, interval: int) -> list[float]:
    """The scale after each step, in Python numbers."""
    scale, good, scales = initial, 0, []
    for finite in outcomes:
        good = good + 1 if finite else 0
        scale = scale / 2 if not finite else scale * 2 if good == interval else scale
        good %= interval
        scale = min(max(scale, 2.0**-24), 2.0**24)
        scales.append(scale)
    return scales


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dynamic_scale_grows_and_backs_off_on_all_ranks_alike(compiled: bool, world: dc.World) -> None:
    mx.random.seed(0)
    model = nn.Linear(2, 1, bias=False)
    clipper = dc.Clipper(1e9, average=True, loss_scale=dc.DynamicLossScale(64.0, growth_interval=3), check="never")
    optimizer = dc.ClippedOptimizer(optim.SGD(0.0), clipper)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array) -> Any:
        loss = nn.value_and_grad(model, lambda x: (model(x) * clipper.loss_scale).sum())
        optimizer.update(model, loss(x)[1])
        return optimizer.report.arrays  # type: ignore[union-attr]

    run: Any = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    outcomes = [bool(b) for b in np.random.default_rng(1).random(40) < 0.8]
    scales = []
    for i, finite in enumerate(outcomes):
        bad = not finite and world.rank == i % world.size
        arrays = run(mx.array([[math.inf if bad else 3.0, 4.0]]))
        mx.eval(state, arrays)
        assert arrays["finite"].item() == finite
        assert not finite or arrays["norm"].item() == 5
        scales.append(clipper.loss_scale.item())  # type: ignore[union-attr]
    assert scales == scales_of(outcomes, 64.0, 3)
    assert len(set(scales)) > 4
    assert same_bits(state)


@alone
def test_a_dynamic_scale_stays_within_bounds() -> None:
    for initial, gradient, bound in ((2.0**23, 1.0, 2.0**24), (2.0**-23, math.nan, 2.0**-24)):
        rule = dc.DynamicLossScale(initial, growth_interval=1)
        clipper = dc.Clipper(1.0, loss_scale=rule, max_consecutive_skips=None)
        for _ in range(4):
            clipper({"w": mx.array([gradient])})
        assert clipper.loss_scale.item() == bound  # type: ignore[union-attr]


@alone
def test_a_dynamic_scale_is_saved_and_restored(tmp_path: Path) -> None:
    def make() -> dc.ClippedOptimizer:
        clipper = dc.Clipper(1.0, loss_scale=dc.DynamicLossScale(growth_interval=3))
        return dc.ClippedOptimizer(optim.Adam(1e-2), clipper)

    def go_on(optimizer: dc.ClippedOptimizer, values: list[float]) -> list[Any]:
        scales = []
        for value in values:
            optimizer.apply_gradients({"w": mx.array([value])}, {"w": mx.ones(1)})
            scales.append(optimizer.clipper.loss_scale.item())  # type: ignore[union-attr]
        return scales

    values = [1.0, math.nan, 1.0, 1.0, 1.0, 1.0, math.inf, 1.0]
    whole = go_on(make(), values)
    for at in range(1, len(values)):
        first, second = make(), make()
        begun = go_on(first, values[:at])
        saved: Any = tree_flatten(first.state)
        mx.save_safetensors(str(tmp_path / "state"), dict(saved))
        loaded: Any = mx.load(str(tmp_path / "state.safetensors"))
        second.state = tree_unflatten(list(loaded.items()))
        assert begun + go_on(second, values[at:]) == whole


@alone
def test_what_a_loss_is_multiplied_by() -> None:
    assert dc.Clipper().loss_scale == 1
    assert dc.Clipper(loss_scale=8.0).loss_scale == 8
    assert dc.Clipper(loss_scale=dc.DynamicLossScale()).loss_scale.item() == 65536  # type: ignore[union-attr]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"initial": 0.0}, r"initial should be from 2\*\*-24 to 2\*\*24, 0.0 was"),
    ({"initial": math.inf}, "initial should be from"),
    ({"growth_factor": 1.0}, "growth_factor should be > 1, 1.0 was"),
    ({"backoff_factor": 1.0}, "backoff_factor should be between 0 and 1, 1.0 was"),
    ({"growth_interval": 0}, "growth_interval should be at least 1, 0 was"),
]


@alone
@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_argument_is_said_so(wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dc.DynamicLossScale(**wrong)


@alone
@pytest.mark.parametrize("policy", ["raise", "propagate"])
def test_a_dynamic_scale_needs_a_policy_that_goes_on(policy: str) -> None:
    with pytest.raises(ValueError, match=f"DynamicLossScale needs nonfinite 'skip' or 'zero', {policy} was"):
        dc.Clipper(loss_scale=dc.DynamicLossScale(), nonfinite=policy)


@alone
@pytest.mark.parametrize("wrong", ["8", dc.DynamicLossScale, [8.0]], ids=str)
def test_what_is_no_scale_is_said_so(wrong: Any) -> None:
    for call in (lambda: dc.Clipper(loss_scale=wrong), lambda: dc.Clipper()({"w": mx.ones(1)}, loss_scale=wrong)):
        with pytest.raises(TypeError, match="loss_scale should be a number, a scalar array or a distclip"):
            call()


@alone
@pytest.mark.parametrize("number", [8, np.float32(8), np.int64(8), np.array(8.0)], ids=repr)
def test_any_number_is_a_scale(number: Any) -> None:
    _, report = dc.Clipper(9.0, loss_scale=number)({"w": mx.array([24.0, 32.0])})
    assert report.norm.item() == 5


@alone
def test_a_dynamic_scale_and_one_of_a_call_are_too_many() -> None:
    clipper = dc.Clipper(loss_scale=dc.DynamicLossScale())
    with pytest.raises(ValueError, match=r"multiply the loss by clipper\.loss_scale and pass none"):
        clipper({"w": mx.ones(1)}, loss_scale=2.0)
