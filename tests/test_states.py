"""A state restored into another rule, history or warm-up is refused by name, and one of an earlier version loads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from reference import alone, normal, told_by_all
from schemes import N, bits

import distclip as dc

OTHERS: list[tuple[Any, Any, str]] = [
    (dc.AutoClip(10, 25), dc.ZClip(), r"saved with AutoClip\(history=25\), and this clipper has ZClip\(warm_up=25\)"),
    (dc.ZClip(), dc.AutoClip(10, 25), r"saved with ZClip\(warm_up=25\), and this clipper has AutoClip\(history=25\)"),
    (dc.AutoClip(10, 50), dc.AutoClip(10, 60), r"AutoClip\(history=50\).*AutoClip\(history=60\).*percentile=10"),
    (dc.AutoClip(50, 1), dc.AutoClip(50, 4), r"AutoClip\(history=1\).*AutoClip\(history=4\)"),
    (dc.ZClip(warm_up=25), dc.ZClip(warm_up=50), r"ZClip\(warm_up=25\).*ZClip\(warm_up=50\)"),
    (dc.AdaGC(warm_up=25), dc.AdaGC(warm_up=50), r"AdaGC\(warm_up=25\) over 2 groups.*AdaGC\(warm_up=50\) over 2"),
    (dc.AdaGC(), dc.ZClip(), r"AdaGC\(warm_up=100\) over 2 groups.*ZClip\(warm_up=25\)"),
    (dc.AutoClip(10, 25), 1.0, r"AutoClip\(history=25\).*a number or a schedule"),
]
others = pytest.mark.parametrize(("old", "new", "said"), OTHERS, ids=[f"{old}, {new}" for old, new, _ in OTHERS])
REMEDY = "Make the clipper with the rule that the state is of, or leave 'threshold' out of the state"


def clipper_of(rule: Any, **options: Any) -> dc.Clipper:
    return dc.Clipper(rule, layout=dc.Replicated(), check="never", **options)


def grads(step: int) -> dict[str, mx.array]:
    return {"a": mx.array([1.0 + step % 3]), "b": mx.array([0.5])}


def trained(rule: Any, steps: int = 30, **options: Any) -> dc.Clipper:
    clipper = clipper_of(rule, **options)
    for step in range(steps):
        mx.eval(clipper(grads(step))[0], clipper.state)
    return clipper


def saved(clipper: dc.Clipper, folder: Path) -> dict[str, Any]:
    """The state as a file gives it back, which keeps no empty dictionaries."""
    flat: Any = tree_flatten(clipper.state)
    mx.save_safetensors(str(folder / "state.safetensors"), dict(flat))
    loaded: Any = mx.load(str(folder / "state.safetensors"))
    return tree_unflatten(list(loaded.items()))  # type: ignore[no-any-return]


@others
def test_a_state_of_another_rule_is_refused_where_it_is_assigned(old: Any, new: Any, said: str, tmp_path: Path) -> None:
    state = saved(trained(old), tmp_path)
    clipper = clipper_of(new)
    clipper.prepare(grads(0))
    before = bits(clipper.state)
    with pytest.raises(ValueError, match=f"(?s){said}.*{REMEDY}"):
        clipper.state = state
    assert bits(clipper.state) == before
    del state["threshold"]
    clipper.state = state  # the remedy
    assert clipper(grads(0))[1].step.item() == 31


@others
def test_a_state_of_another_rule_is_refused_in_the_next_call(old: Any, new: Any, said: str, tmp_path: Path) -> None:
    state = saved(trained(old), tmp_path)
    for used in (False, True):
        clipper = trained(new, 2 if used else 0)
        clipper.state.update(state)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"(?s){said}.*{REMEDY}") as error:
                clipper(grads(0))
        assert len(set(told_by_all(str(error.value)))) == 1
        clipper.state["threshold"] = {}
        mx.eval(clipper(grads(0))[0])


@alone
@others
def test_a_state_of_another_rule_is_refused_inside_compile(old: Any, new: Any, said: str) -> None:
    clipper = clipper_of(new)
    clipper.prepare(grads(0))
    clipper.state["threshold"].update(trained(old).state["threshold"])
    if clipper.state["threshold"].keys() != trained(old).state["threshold"].keys():
        return  # a mixture, which the clipper cannot tell

    @partial(mx.compile, inputs=clipper.state, outputs=clipper.state)
    def step(tree: Any) -> Any:
        return clipper(tree)[0]

    with pytest.raises(ValueError, match=f"(?s){said}"):
        step(grads(0))


@alone
def test_an_optimizer_refuses_it_before_it_takes_anything(tmp_path: Path) -> None:
    def make(rule: Any) -> tuple[nn.Module, dc.ClippedOptimizer]:
        model = nn.Linear(2, 1, bias=False)
        optimizer = dc.ClippedOptimizer(optim.Adam(0.1), clipper_of(rule))
        optimizer.init(model.trainable_parameters())
        return model, optimizer

    model, first = make(dc.ZClip(warm_up=3))
    for _ in range(4):
        first.update(model, {"weight": mx.array([[1.0, 2.0]])})
    _, second = make(dc.ZClip(warm_up=4))
    with pytest.raises(ValueError, match=r"ZClip\(warm_up=3\)"):
        second.state = first.state
    assert second.step.item() == 0
    _, third = make(dc.ZClip(alpha=0.5, warm_up=3))  # what is no part of the state may change
    third.state = first.state
    assert third.step.item() == 4


@alone
@pytest.mark.parametrize("rule", [1.0, dc.AutoClip(history=9), dc.ZClip(warm_up=3), dc.AdaGC(warm_up=3)], ids=str)
@pytest.mark.parametrize("at", [2, 5])
def test_a_state_of_the_version_before_goes_on(rule: Any, at: int, tmp_path: Path) -> None:
    """AdaGC kept one count for all groups."""
    whole = trained(rule, 9)
    old = saved(trained(rule, at), tmp_path)
    if isinstance(rule, dc.AdaGC):
        old["threshold"] = {"running": old["threshold"]["running"], "count": old["threshold"]["count"][0]}
    for in_place in (False, True):
        clipper = clipper_of(rule)
        if in_place:
            clipper.state.update(old)
        else:
            clipper.state = old
        for step in range(at, 9):
            mx.eval(clipper(grads(step))[0], clipper.state)
        assert bits(clipper.state) == bits(whole.state)


@alone
def test_a_number_goes_on_with_a_rule_and_a_rule_of_ones_own_keeps_what_it_likes() -> None:
    class Growing:
        per_group = False

        def init(self, groups: int) -> dict[str, mx.array]:
            return {}

        def update(self, state: Any, norm: mx.array, norms: mx.array, step: mx.array) -> Any:
            seen = mx.concatenate([state.get("seen", mx.zeros(0)), norm[None]])
            return mx.max(seen), {"seen": seen}

    clipper = clipper_of(dc.AutoClip())
    clipper.state = trained(1.0).state
    assert clipper(grads(0))[1].step.item() == 31
    clipper = clipper_of(Growing())
    clipper.state = trained(Growing(), 3).state
    clipper(grads(0))
    assert clipper.state["threshold"]["seen"].shape == (4,)
    clipper = clipper_of(1.0)
    with pytest.raises(ValueError, match="saved with a rule of its own, with seen"):
        clipper.state = trained(Growing(), 3).state


def test_a_state_of_another_number_of_ranks_goes_on(world: dc.World) -> None:
    def make() -> dc.Clipper:
        return dc.Clipper(1.0, average=True, rank_batch=2, check="never")

    first = make()
    mx.eval(first({"w": normal((3,), world.rank)})[0], first.state)
    state = {**first.state, "noise": {**first.state["noise"], "far": mx.full((N + 3,), 7, mx.int32)}}
    second = make()
    second.state = state
    for _ in range(2):
        mx.eval(second({"w": normal((3,), world.rank)})[0], second.state)
    assert second.state["noise"]["far"].tolist() == [0] * N
    assert second.state["step"].item() == 3
