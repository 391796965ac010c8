"""When a step with finite gradients is a spike: a rule for ``skip_above``, from a window of the norms before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from distclip.arguments import check, described_rule, number, whole
from distclip.thresholds import Scheduled, State, Threshold, threshold_of

Z_SCORE = 6.0  # where nothing else is said: that of OLMo and MaxText
LEAST_DEVIATION = 1e-2  # of the mean, so that norms which are all but equal are no spikes


@dataclass(frozen=True)
class Spike(Threshold):
    """Norms that stand out from those before, for a :class:`distclip.Clipper` to skip: ``skip_above=Spike()``.

    Above ``mean + z_score * deviation`` of the last ``history`` norms, as OLMo and MaxText skip steps (there from the
    loss too); or above ``ratio`` times their median, which single spikes do not move. No step is a spike until half of
    the history is there, or where a norm is not finite.

    A norm that was skipped enters the history as the limit that it was above. So a spike does not blind the rule to the
    next one, and where norms stay higher the limit rises with every skip until they pass, if
    ``max_consecutive_skips`` lets it.

    Args:
        z_score (float, optional): how many standard deviations above the mean. Default: 6, without ``ratio``.
        ratio (float, optional): how many times the median, above 1.
        history (int): how many norms are kept.
    """

    z_score: float | None = None
    ratio: float | None = None
    history: int = 128
    per_group = False
    __repr__ = described_rule

    def __post_init__(self) -> None:
        if self.z_score is not None and self.ratio is not None:
            raise ValueError("Spike takes a z_score or a ratio, not both")
        z_score = Z_SCORE if self.z_score is None and self.ratio is None else self.z_score
        for name, value, least in (("z_score", z_score, 0.0), ("ratio", self.ratio, 1.0)):
            if value is not None:
                plain = number(name, value)
                object.__setattr__(self, name, plain)
                check(plain > least, f"{name} should be > {least:g}", value)
        object.__setattr__(self, "history", whole("history", self.history, 2))

    def init(self, groups: int) -> State:
        return {"allowed": mx.zeros(self.history), "count": mx.array(0, mx.int32)}

    def update(self, state: State, norm: mx.array, norms: mx.array, step: mx.array) -> tuple[mx.array, State]:
        kept, count, place = state["allowed"], state["count"], mx.arange(self.history)
        size = mx.minimum(count, self.history)
        limit = mx.where(2 * size < self.history, mx.inf, self._limit(kept, place < size, size))
        finite = mx.isfinite(norm)
        here = mx.logical_and(place == count % self.history, finite)
        following = {"allowed": mx.where(here, mx.minimum(norm, limit), kept), "count": count + finite.astype(mx.int32)}
        return limit, following

    def _limit(self, kept: mx.array, held: mx.array, size: mx.array) -> mx.array:
        """The largest norm that is no spike, from the norms that are held."""
        most = mx.maximum(size, 1)
        if self.ratio is not None:
            ordered = mx.sort(mx.where(held, kept, mx.inf))
            return self.ratio * (ordered[(most - 1) // 2] + ordered[most // 2]) / 2
        mean = mx.sum(mx.where(held, kept, 0.0)) / most
        variance = mx.sum(mx.where(held, mx.square(kept - mean), 0.0)) / most
        return mean + (self.z_score or Z_SCORE) * mx.maximum(mx.sqrt(variance), LEAST_DEVIATION * mean)


def rule_for_skips(skip_above: Any, nonfinite: str) -> Threshold:
    """The rule that ``skip_above`` means.

    Raises:
        ValueError: it is 0 or negative, or no step is to be skipped.
        TypeError: it is neither a number, a schedule nor a rule for the global norm.
    """
    check(nonfinite == "skip", "skip_above needs nonfinite='skip'", repr(nonfinite))
    rule = threshold_of(skip_above, "skip_above")
    if rule.per_group:
        raise TypeError(f"skip_above is {skip_above!r}, which limits groups; pass a number, a schedule, or dc.Spike()")
    limit = rule.max_norm if isinstance(rule, Scheduled) else None
    check(not (isinstance(limit, float | int) and limit == 0), "skip_above should be > 0, or None for no limit", limit)
    return rule
