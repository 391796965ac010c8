"""Rules for the largest norm allowed in a step: a number, a schedule, or a rule that learns from the norms so far.

A rule is a pair of pure functions: ``init(groups)`` makes its state, a dictionary of arrays, and ``update`` takes state
and norms to a threshold and the next state. The norms are the same bits on every rank, so the state is too. A norm that
is not finite never enters a state. All of it is lazy and traceable by ``mx.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from distclip.arguments import brief, check, described_rule, make_plain, shown, whole
from distclip.policy import EPSILON, checked_max_norm

State = dict[str, mx.array]


class Threshold(Protocol):
    """A rule for ``max_norm``.

    Attributes:
        per_group: whether the threshold is one for each group of leaves, shape (groups,), rather than one, shape ().
    """

    @property
    def per_group(self) -> bool: ...

    def init(self, groups: int) -> State:
        """The state before the first step, for a number of groups of leaves. Arrays that have a value for each group
        have them along their first axis: they grow with the groups when leaves join later."""

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        """The threshold of this step, and the next state.

        Args:
            state: of :meth:`init` or of the last update.
            norm: the global norm, float32, shape (), replicated.
            norms: the norms of the groups, float32, shape (groups,), replicated.
            step: how many steps came before, int32, shape (); skipped steps do not count.
        """


MaxNorm = float | mx.array | Callable[[mx.array], Any] | Threshold  # what a user may pass: see threshold_of


@dataclass(frozen=True)
class Scheduled(Threshold):
    """A number or scalar array, always the same; or a schedule of MLX (``mlx.optimizers.schedulers``), or any other
    function of the step."""

    max_norm: float | mx.array | Callable[[mx.array], Any]
    per_group = False

    def __post_init__(self) -> None:
        if not callable(self.max_norm):
            object.__setattr__(self, "max_norm", checked_max_norm(self.max_norm))

    def __repr__(self) -> str:
        return brief(self.max_norm)

    def init(self, groups: int) -> State:
        return {}

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        limit = self.max_norm(step) if callable(self.max_norm) else self.max_norm
        return mx.array(limit, mx.float32).reshape(()), state


@dataclass(frozen=True)
class AutoClip(Threshold):
    """A percentile of the norms so far: Seetharaman, Wichern, Pardo and Le Roux, 2020, https://arxiv.org/abs/2007.14469.

    The norm of this step is put into the history first, and the threshold is the history's percentile with linear
    interpolation. There is no warm-up: the first threshold is the first norm.

    Args:
        percentile: between 0 and 100. Default: the paper's 10.
        history: how many norms are kept; the paper keeps all.
    """

    percentile: float = 10.0
    history: int = 10_000
    per_group = False

    def __post_init__(self) -> None:
        make_plain(self, "percentile")
        object.__setattr__(self, "history", whole("history", self.history, 1))
        check(0 <= self.percentile <= 100, "percentile should be between 0 and 100", self.percentile)

    def init(self, groups: int) -> State:
        return {"norms": mx.zeros(self.history), "count": mx.array(0, mx.int32)}

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        finite, place = mx.isfinite(norm), mx.arange(self.history)
        here = mx.logical_and(place == state["count"] % self.history, finite)
        kept = mx.where(here, norm, state["norms"])
        count = state["count"] + finite.astype(mx.int32)
        size = mx.minimum(count, self.history)
        ordered = mx.sort(mx.where(place < size, kept, mx.inf))
        at = (self.percentile / 100) * mx.maximum(size - 1, 0).astype(mx.float32)
        below = mx.floor(at).astype(mx.int32)
        low, high = ordered[below], ordered[mx.minimum(below + 1, mx.maximum(size - 1, 0))]
        threshold = mx.where(size > 0, low + (high - low) * (at - below), mx.inf)
        return threshold, {"norms": kept, "count": count}


@dataclass(frozen=True)
class ZClip(Threshold):
    """Limit norms that stand out from a running mean: Kumar, Owen, Chowdhury and Güra, 2025, https://arxiv.org/abs/2504.02507.

    For the first steps norms are stored, and clipped to ``max_norm`` only. Their mean and population variance start the
    running mean m and variance v. Then a norm n with ``z = (n - m) / (sqrt(v) + eps)`` above ``z_score`` is limited to
    ``m + z_score**2 sqrt(v) / z``, and others by ``max_norm`` only. The mean, and then the variance, follow what was
    allowed.

    Args:
        alpha: smoothing of mean and variance.
        z_score: how many standard deviations above the mean a norm may be.
        max_norm: a limit in any case; ``math.inf`` for none.
        warm_up: steps that start the statistics.
        eps: added to the standard deviation.
    """

    alpha: float = 0.97
    z_score: float = 2.5
    max_norm: float = 1.0
    warm_up: int = 25
    eps: float = 1e-6
    per_group = False
    __repr__ = described_rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", checked_max_norm(self.max_norm))
        make_plain(self, "alpha", "z_score", "eps")
        object.__setattr__(self, "warm_up", whole("warm_up", self.warm_up, 1))
        check(0 <= self.alpha < 1, "alpha should be at least 0 and below 1", self.alpha)
        check(self.z_score > 0, "z_score should be > 0", self.z_score)

    def init(self, groups: int) -> State:
        return {
            "norms": mx.zeros(self.warm_up),
            "count": mx.array(0, mx.int32),
            "mean": mx.array(0.0),
            "variance": mx.array(0.0),
        }

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        finite, count, mean, variance = mx.isfinite(norm), state["count"], state["mean"], state["variance"]
        warming = count < self.warm_up
        stored = mx.where(mx.arange(self.warm_up) == count, norm, state["norms"])

        deviation = mx.sqrt(variance)
        z = (norm - mean) / (deviation + self.eps)
        spike = mx.logical_and(z > self.z_score, mx.logical_not(warming))
        limit = mean + self.z_score * deviation / (z / self.z_score)
        threshold = mx.minimum(mx.where(spike, limit, mx.inf), self.max_norm)

        allowed = mx.where(spike, limit, norm)
        next_mean = self.alpha * mean + (1 - self.alpha) * allowed
        next_variance = self.alpha * variance + (1 - self.alpha) * mx.square(allowed - next_mean)
        last = count == self.warm_up - 1
        next_mean = mx.where(warming, mx.where(last, mx.mean(stored), mean), next_mean)
        next_variance = mx.where(warming, mx.where(last, mx.var(stored), variance), next_variance)
        following = {
            "norms": mx.where(warming, stored, state["norms"]),
            "count": mx.minimum(count + 1, self.warm_up),
            "mean": next_mean,
            "variance": mx.minimum(next_variance, mx.finfo(mx.float32).max),  # the square of a huge norm is infinite
        }
        return threshold, _if(finite, following, state)


@dataclass(frozen=True)
class AdaGC(Threshold):
    """Limit each group of leaves by its own running norm: Wang and others, 2025, https://arxiv.org/abs/2502.11034.

    During warm-up a group is clipped by the global norm to ``max_norm``, and keeps the least of its clipped norms. Then
    it may have ``ratio`` times its running norm, which follows its clipped norms. The paper's groups are tensors.
    A step in which a group has no gradient, or zeros, does not count for it: a leaf may be frozen, or join later.

    Args:
        ratio: the paper's lambda_rel.
        beta: smoothing of the running norms.
        warm_up: steps of global clipping, for each group from its first one.
        max_norm: the global threshold of the warm-up, the paper's lambda_abs.
    """

    ratio: float = 1.05
    beta: float = 0.98
    warm_up: int = 100
    max_norm: float = 1.0
    per_group = True
    __repr__ = described_rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", checked_max_norm(self.max_norm))
        make_plain(self, "ratio", "beta")
        object.__setattr__(self, "warm_up", whole("warm_up", self.warm_up, 1))
        check(self.ratio > 0, "ratio should be > 0", self.ratio)
        check(0 <= self.beta < 1, "beta should be at least 0 and below 1", self.beta)

    def init(self, groups: int) -> State:
        return {
            "running": mx.full((groups,), mx.inf),
            "count": mx.zeros(groups, mx.int32),
            "warm_up": mx.zeros(self.warm_up, mx.uint8),  # its length tells a state of another warm-up apart
        }

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        warming, running = state["count"] < self.warm_up, state["running"]
        together = norms * mx.minimum(self.max_norm / (norm + EPSILON), 1.0)
        limits = self.ratio * running
        threshold = mx.where(warming, together, limits)
        followed = mx.where(mx.isinf(running), norms, self.beta * running + (1 - self.beta) * mx.minimum(norms, limits))
        following = {
            "running": mx.where(warming, mx.minimum(running, together), followed),
            "count": mx.minimum(state["count"] + 1, self.warm_up),
        }
        # A gradient of zeros, such as that of the first matrix of a LoRA pair in the first step, does not count.
        seen = mx.logical_and(mx.isfinite(norm), mx.minimum(together, norms) > 0)
        return threshold, {**state, **_if(seen, following, state)}


def threshold_of(max_norm: Any, name: str = "max_norm") -> Threshold:
    """The rule that ``max_norm``, or another argument, means: a number or scalar array, a schedule, or a rule itself.

    Raises:
        ValueError: a number that is negative or NaN.
        TypeError: anything else.
    """
    if all(hasattr(max_norm, part) for part in ("init", "update", "per_group")) and not isinstance(max_norm, type):
        return max_norm  # type: ignore[no-any-return]
    try:
        if not isinstance(max_norm, (type, dict)):  # a model is a dictionary, and callable
            return Scheduled(max_norm if callable(max_norm) else checked_max_norm(max_norm, name))
    except TypeError:
        pass
    rule = "dc.AutoClip()" if name == "max_norm" else "dc.Spike()"
    wrong = shown(max_norm)
    raise TypeError(f"{name} is {wrong}; pass a number, a schedule (step -> number), or a rule such as {rule}")


def _if(condition: mx.array, following: State, state: State) -> State:
    return {name: mx.where(condition, value, state[name]) for name, value in following.items()}
