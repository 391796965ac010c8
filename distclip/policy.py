"""What a threshold and a norm that is not finite do: the scale, and the error that names ranks and leaves."""

from __future__ import annotations

import math

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.streams import stream_of
from distclip.layout import Placed
from distclip.schedule import Schedule
from distclip.tree import Leaves
from distclip.world import gather_text, init

EPSILON = 1e-6  # keeps max_norm / norm finite at a norm of 0; the value of MLX and PyTorch
POLICIES = ("propagate", "raise", "zero")


def check(condition: bool, text: str, value: object) -> None:
    """Raise ValueError with a text that says what a value should be, unless the condition holds."""
    if not condition:
        raise ValueError(f"{text}, {value} was provided instead")


def check_max_norm(max_norm: float | mx.array) -> None:
    # An array is not looked at: it may be traced, and to look would wait for it.
    check(isinstance(max_norm, mx.array) or max_norm >= 0, "max_norm should be >= 0", max_norm)


def check_policy(nonfinite: str, policies: tuple[str, ...] = POLICIES) -> None:
    if nonfinite not in policies:
        raise ValueError(f"nonfinite should be one of {', '.join(map(repr, policies))}, not {nonfinite!r}")


def scale_of(norm: mx.array, max_norm: float | mx.array) -> mx.array:
    """``min(1, max_norm / (norm + 1e-6))``, float32, shape (); 1 for an infinite ``max_norm``, NaN for a NaN norm."""
    unclipped = mx.where(mx.isnan(norm), norm, 1.0)
    if isinstance(max_norm, mx.array):
        limit = mx.maximum(max_norm.astype(mx.float32).reshape(()), 0.0)  # a negative one would turn the gradients
        return mx.where(mx.isinf(limit), unclipped, mx.minimum(limit / (norm + EPSILON), 1.0))
    return unclipped if math.isinf(max_norm) else mx.minimum(max_norm / (norm + EPSILON), 1.0)


def factor_of(
    norm: mx.array, finite: mx.array | None, max_norm: float | mx.array, schedule: Schedule
) -> tuple[mx.array, mx.array | None]:
    """The scale of a norm that the CPU made, and ``finite`` if it is wanted, for the stream that uses them."""
    norm, *flag = schedule.bring([norm] if finite is None else [norm, finite])
    with schedule.arithmetic():
        return scale_of(norm, max_norm), flag[0] if flag else None


def scale_of_groups(norms: mx.array, limits: mx.array, whole: mx.array) -> mx.array:
    """``min(1, limit / norm)`` of each group, float32, shape (groups,); a group's norm may be far below 1e-6."""
    limited = mx.where(norms <= limits, 1.0, limits / norms)
    return mx.where(mx.isnan(whole), whole, limited)


def raise_if_bad(
    placed: Placed, norm: mx.array, finite: mx.array, norm_type: float, averaged: mx.distributed.Group | None = None
) -> None:
    """Raise the same FloatingPointError on every rank if the norm is not finite.

    Args:
        placed: the gradients, before they are averaged.
        averaged: the ranks that were averaged over, if any: the average of all is bad if the gradient of one is.
    """
    if finite.item():
        return
    group = placed.agreed if placed.agreed is not None else averaged
    mine = "; ".join(bad_leaves(placed.leaves, norm_type))
    by_rank = {init().rank: mine}
    if group is not None and group.size() > 1:
        by_rank = dict(enumerate(gather_text(mine, group)))
    lines = [f"  rank {rank}: {text}" for rank, text in by_rank.items() if text]
    raise FloatingPointError(
        f"The global norm of the gradients is {norm.item()}, so they cannot be clipped:\n"
        + "\n".join(lines or ["  every value is finite, but their norm does not fit float32"])
        + '\nLook for the batch or the layer that made them, or pass nonfinite="zero" or "propagate" to go on.'
    )


def bad_leaves(leaves: Leaves, norm_type: float) -> list[str]:
    """The first five leaves with values that are not finite, or whose square does not fit float32, in words."""
    bad = []
    for path, leaf in zip(leaves.paths, leaves.arrays, strict=True):
        on = stream_of(leaf, None)
        nan, inf = (mx.sum(test(leaf, stream=on), stream=on).item() for test in (mx.isnan, mx.isinf))
        counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "infinite")) if count]
        if not counts and norm_type == 2 and mx.take(kernels.sum_squares([leaf]), 1, stream=mx.cpu).item():
            largest = mx.take(kernels.max_abs([leaf]), 0, stream=mx.cpu).item()
            counts = [f"the square of {largest:.3g} does not fit float32"]
        if counts:
            bad.append(f"'{path}' ({' and '.join(counts)})")
    return bad[:5] + ([f"and {len(bad) - 5} more leaves"] if len(bad) > 5 else [])
