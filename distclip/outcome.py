"""What becomes of a step, from its norms and the clipper's state: its scale, its report, and the next state. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from distclip import noise
from distclip.policy import scale_of, scale_of_learned
from distclip.thresholds import Scheduled, Threshold


@dataclass(frozen=True)
class Outcome:
    """What becomes of a step.

    Attributes:
        arrays: of the report.
        scale: of the gradients, float32, shape (), or (groups,) for a threshold per group, and one more for leaves
            whose group has no name yet.
        taken: whether the gradients are to be used, bool, shape ().
        following: what changes in the state.
    """

    arrays: dict[str, mx.array]
    scale: mx.array
    taken: mx.array
    following: dict[str, Any]


def outcome(
    rules: Mapping[str, Threshold],
    nonfinite: str,
    state: dict[str, Any],
    norms: mx.array,
    finite: mx.array,
    groups: int,
) -> Outcome:
    """Judge a step.

    Args:
        rules: "threshold", the rule for the largest norm; and "skip_above", above which a step is skipped, if any.
        nonfinite: the policy for a norm that is not finite.
        state: of the clipper.
        norms: the global norm, and those of the groups: float32, shape (1 + groups,), or (2 + groups,) where the last
            is of the leaves whose group has no name yet.
        finite: whether all is finite, bool, shape ().
        groups: how many groups have names.
    """
    norm, named, unnamed = norms[0], norms[1 : 1 + groups], norms[1 + groups :]
    skips, step = nonfinite == "skip", state["step"] + 1
    done = state["step"] - state["bad"] if skips else state["step"]  # a schedule waits, as the optimizer's do
    taken, following, spikes = finite, dict[str, Any](), dict[str, mx.array]()
    threshold = rules["threshold"]
    limits, learned = threshold.update(state["threshold"], norm, named, done)
    if "skip_above" in rules:
        most, following["skip_above"] = rules["skip_above"].update(state["skip_above"], norm, named, done)
        spike = mx.logical_and(finite, norm > most)
        taken = mx.logical_and(finite, mx.logical_not(spike))
        spikes = {"skip_above": most, "spike": spike}
        following["spikes"] = state["spikes"] + spike.astype(mx.int32)
        # What is skipped teaches the threshold nothing.
        learned = {name: mx.where(spike, state["threshold"][name], value) for name, value in learned.items()}
    if isinstance(threshold, Scheduled):
        scale = whole = scale_of(norm, limits)
    else:
        scale = whole = scale_of_learned(named if threshold.per_group else norm, limits, norm)
        if threshold.per_group and unnamed.size > 0:
            first, _ = threshold.update(threshold.init(1), norm, unnamed, mx.array(0, mx.int32))
            whole = mx.concatenate([scale, scale_of_learned(unnamed, first, norm)])
    clipped, bad = mx.logical_and(taken, mx.any(whole < 1)), mx.logical_not(taken)
    arrays = {"norm": norm, "threshold": limits, "scale": scale, "finite": finite}
    arrays |= {"skipped": mx.logical_and(bad, mx.array(skips)), "clipped": clipped, "step": step}
    arrays |= spikes
    following |= {name: arrays[name] for name in ("step", "norm", "scale", "finite")}
    following["clipped"] = state["clipped"] + clipped.astype(mx.int32)
    following["bad"] = state["bad"] + bad.astype(mx.int32)
    following["in_a_row"] = (state["in_a_row"] + bad.astype(mx.int32)) * bad.astype(mx.int32)
    following["threshold"] = learned
    if "group_norms" in state:
        arrays["group_norms"] = following["group_norms"] = named
    if unnamed.size > 0:
        following["unnamed"] = unnamed[0] != 0  # NaN is not 0 either
    return Outcome(arrays, whole, taken, following)


def with_noise(found: Outcome, state: dict[str, Any], rank_norms: mx.array, rows: int) -> Outcome:
    """An outcome, with the ranks' own norms, and the gradient noise scale where there are several ranks.

    Args:
        rank_norms: float32, shape (ranks,).
        rows: of the batch of each rank.
    """
    arrays, following = {**found.arrays, "rank_norms": rank_norms}, found.following
    if rank_norms.shape[0] > 1:
        arrays["noise_scale"], learned = noise.update(state["noise"], rank_norms, found.arrays["norm"], rows)
        following = {**following, "noise": learned}
    return replace(found, arrays=arrays, following=following)
