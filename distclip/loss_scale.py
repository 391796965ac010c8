"""The number that a loss is multiplied by, so that small gradients do not vanish in float16."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from distclip.engine.streams import is_tracing
from distclip.policy import check
from distclip.schedule import callers_level

LEAST, MOST = 2.0**-24, 2.0**24  # of a dynamic scale: it neither vanishes nor overflows; the most is that of Apex


@dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that grows while all is finite, and backs off when it is not: ``Clipper(loss_scale=...)``.

    After ``growth_interval`` steps in a row with a finite norm the scale is multiplied by ``growth_factor``, after a
    norm that is not finite by ``backoff_factor``. It stays within 2**-24 and 2**24. All ranks have the same scale,
    since they agree on what is finite. Needs the policy ``"skip"`` or ``"zero"``. Algorithm: Micikevicius et al. 2018,
    "Mixed Precision Training"; the defaults are those of PyTorch's ``GradScaler``.

        >>> import mlx.core as mx
        >>> from distclip import Clipper
        >>> clipper = Clipper(1.0, loss_scale=DynamicLossScale(initial=1024))
        >>> grads, report = clipper({"w": mx.array([float("inf"), 1.0], mx.float16)})
        >>> print(report.skipped.item(), clipper.loss_scale.item())
        True 512.0

    Args:
        initial (float): the scale of the first step. Default: ``2.0**16``.
        growth_factor (float): above 1. Default: ``2.0``.
        backoff_factor (float): between 0 and 1. Default: ``0.5``.
        growth_interval (int): steps. Default: ``2000``.

    Raises:
        ValueError: an argument is out of its range.
    """

    initial: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        check(LEAST <= self.initial <= MOST, "initial should be from 2**-24 to 2**24", self.initial)
        check(1 < self.growth_factor < math.inf, "growth_factor should be > 1", self.growth_factor)
        check(0 < self.backoff_factor < 1, "backoff_factor should be between 0 and 1", self.backoff_factor)
        check(self.growth_interval >= 1, "growth_interval should be at least 1", self.growth_interval)

    def init(self) -> dict[str, mx.array]:
        """The state: the scale, float32, and how many steps in a row were good, int32, shape () each."""
        return {"scale": mx.array(self.initial, mx.float32), "good": mx.array(0, mx.int32)}

    def update(self, state: dict[str, mx.array], finite: mx.array) -> dict[str, mx.array]:
        """The state after a step."""
        good = (state["good"] + 1) * finite.astype(mx.int32)
        grows = good >= self.growth_interval
        factor = mx.where(finite, mx.where(grows, self.growth_factor, 1.0), self.backoff_factor)
        return {"scale": mx.clip(state["scale"] * factor, LEAST, MOST), "good": mx.where(grows, 0, good)}


LossScale = float | mx.array | DynamicLossScale | None


def check_loss_scale(loss_scale: LossScale, nonfinite: str = "skip") -> None:
    dynamic = isinstance(loss_scale, DynamicLossScale)  # which finds its bound by steps that are bad
    check(not dynamic or nonfinite in ("skip", "zero"), "DynamicLossScale needs nonfinite 'skip' or 'zero'", nonfinite)
    if not isinstance(loss_scale, (mx.array, DynamicLossScale, type(None))):  # an array's value is not looked at
        if not hasattr(loss_scale, "__float__"):
            raise TypeError(
                f"loss_scale should be a number, a scalar array or a distclip.DynamicLossScale(), not {loss_scale!r}"
            )
        check(0 < loss_scale < math.inf, "loss_scale should be > 0", loss_scale)


def of_this_step(loss_scale: LossScale, state: dict[str, Any]) -> float | mx.array:
    """The loss scale of a clipper with some state: 1 if it has none."""
    if isinstance(loss_scale, DynamicLossScale):
        return state["loss_scale"]["scale"]  # type: ignore[no-any-return]
    return 1.0 if loss_scale is None else loss_scale


def divisor(given: float | mx.array | None, own: LossScale, state: dict[str, Any]) -> mx.array | None:
    """What gradients are to be divided by, float32, shape (): the scale given with a call, or a clipper's own.

    Raises:
        ValueError: a number is not above 0, or a scale is given where it is dynamic.
    """
    if given is not None and isinstance(own, DynamicLossScale):
        raise ValueError("The Clipper has a DynamicLossScale: multiply the loss by clipper.loss_scale and pass none.")
    check_loss_scale(given)
    if given is None and own is None:
        return None
    if given is None and isinstance(own, mx.array) and is_tracing():
        _warn_of_constant()
    scale = of_this_step(own, state) if given is None else given
    return mx.array(scale, mx.float32).reshape(())


def _warn_of_constant() -> None:
    warnings.warn(
        "The loss scale was given to Clipper as an array, and a compiled function keeps the value that it has now. "
        "Pass one that changes with each call, update(model, grads, loss_scale=s) with s an input of the function, or "
        "use distclip.DynamicLossScale; pass one that does not change as a number.",
        RuntimeWarning,
        stacklevel=callers_level(),
    )


def unscaled(
    norms: mx.array, finite: mx.array, rank_norms: mx.array | None, loss_scale: mx.array
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Norms without the loss scale. One that makes a norm NaN or infinite (0, NaN) is as bad as such gradients."""
    norms = norms / loss_scale
    finite = mx.logical_and(finite, mx.isfinite(norms[0]))
    return norms, finite, None if rank_norms is None else rank_norms / loss_scale
