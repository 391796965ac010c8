"""The state of a clipper before its first step; and that of a threshold rule, restored: whose it is, told by its names
and shapes. No value is looked at."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip import noise
from distclip.loss_scale import DynamicLossScale, LossScale
from distclip.spikes import Spike
from distclip.thresholds import AdaGC, AutoClip, Scheduled, State, Threshold, ZClip

RULES = (Scheduled, AutoClip, ZClip, AdaGC, Spike)


def first_state(loss_scale: LossScale, *, groups: bool, spikes: bool, ranks: int | None) -> dict[str, Any]:
    """The state of a clipper before its first step, without that of its rules.

    Args:
        groups: whether groups of leaves are measured.
        spikes: whether finite steps can be skipped.
        ranks: whose own norms are measured; None if they are not.
    """
    state: dict[str, Any] = {name: mx.array(0, mx.int32) for name in ("step", "clipped", "bad", "in_a_row")}
    state |= {"norm": mx.array(0.0), "scale": mx.array(1.0), "finite": mx.array(True)}
    if groups:
        state |= {"group_norms": mx.zeros(0), "unnamed": mx.array(False)}
    if spikes:
        state["spikes"] = mx.array(0, mx.int32)
    if isinstance(loss_scale, DynamicLossScale):
        state["loss_scale"] = loss_scale.init()
    if ranks is not None:
        state["noise"] = noise.init(ranks)
    return state


def fitted(rule: Threshold, state: State, groups: int, name: str = "threshold") -> State:
    """A state that was saved, for a rule to go on from; a fresh one for an empty one.

    A state of a rule of one's own is returned as it is: such a rule may keep what it likes.

    Args:
        groups: how many groups of leaves there are.
        name: of the state in the clipper's.

    Raises:
        ValueError: the state is of another rule, history or warm-up, or of another number of groups.
    """
    if type(rule) not in RULES:
        return state or rule.init(groups)
    fresh = rule.init(groups)
    state = _of_this_version(rule, state or fresh, fresh)
    if shapes(state) != shapes(fresh):
        remedy = "Make the clipper with the rule that the state is of"
        if type(rule) is AdaGC and shapes(rule.init(state.get("running", fresh["running"]).size)) == shapes(state):
            remedy = "Call clipper.prepare with parameters that have the groups of the state before it is restored"
        raise ValueError(
            f"clipper.state['{name}'] was saved with {_describe(state)}, and this clipper has {_describe(fresh)}: "
            f"{rule}. {remedy}, or leave '{name}' out of the state, so that the rule starts afresh."
        )
    return state


def grown(rule: Threshold, state: State, names: list[str], more: list[str]) -> State:
    """The state of a rule that has learned from some groups of leaves, with room for more.

    Args:
        names: of the groups so far, in the order of the state's first axes.
        more: of all groups.
    """
    fresh, before = rule.init(len(more)), rule.init(len(names))
    at = mx.array([more.index(name) for name in names])
    by_group = {name: value for name, value in fresh.items() if value.shape != before[name].shape}
    for name, value in by_group.items():
        value[at] = state[name]
    return {**state, **by_group}


def _of_this_version(rule: Threshold, state: State, fresh: State) -> State:
    """The state of AdaGC as it was before each group had a warm-up of its own, as it is now."""
    if type(rule) is AdaGC and state.keys() == {"running", "count"} and state["count"].ndim == 0:
        each = state["count"] + fresh["count"]
        return {"running": state["running"], "count": each, "warm_up": fresh["warm_up"]}
    return state


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in state.items()}


def _describe(state: State) -> str:
    """Which rule a state is of."""
    size = {name: value.size for name, value in state.items()}
    if not size:
        return "a number or a schedule"
    if size.keys() == {"norms", "count"}:
        return f"AutoClip(history={size['norms']})"
    if size.keys() == {"norms", "count", "mean", "variance"}:
        return f"ZClip(warm_up={size['norms']})"
    if size.keys() == {"allowed", "count"}:
        return f"Spike(history={size['allowed']})"
    if size.keys() == {"running", "count", "warm_up"}:
        return f"AdaGC(warm_up={size['warm_up']}) over {size['running']} groups of leaves"
    if size.keys() == {"running", "count"}:
        return f"AdaGC() over {size['running']} groups of leaves"
    return f"a rule of its own, with {', '.join(sorted(size))}"
