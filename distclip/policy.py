"""What a threshold and a norm that is not finite do: the scale, and the error that names ranks and leaves."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.operations import stream_of
from distclip.gather import gather_text
from distclip.tree import flatten
from distclip.world import init

EPSILON = 1e-6  # keeps max_norm / norm finite at a norm of 0; the value of MLX and PyTorch
POLICIES = ("propagate", "raise", "zero")


def check_max_norm(max_norm: float | mx.array) -> None:
    # An array is not looked at: it may be traced, and to look would wait for it.
    if not isinstance(max_norm, mx.array) and not max_norm >= 0:
        raise ValueError(f"max_norm should be >= 0, {max_norm} was provided instead")


def check_policy(nonfinite: str) -> None:
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite should be one of {', '.join(map(repr, POLICIES))}, not {nonfinite!r}")


def scale_of(norm: mx.array, max_norm: float | mx.array) -> mx.array:
    """``min(1, max_norm / (norm + 1e-6))``, float32, shape (); 1 for an infinite ``max_norm``, NaN for a NaN norm."""
    unclipped = mx.where(mx.isnan(norm), norm, 1.0)
    if isinstance(max_norm, mx.array):
        limit = mx.maximum(max_norm.astype(mx.float32).reshape(()), 0.0)  # a negative one would turn the gradients
        return mx.where(mx.isinf(limit), unclipped, mx.minimum(limit / (norm + EPSILON), 1.0))
    return unclipped if math.isinf(max_norm) else mx.minimum(max_norm / (norm + EPSILON), 1.0)


def raise_if_bad(
    grads: Any, group: mx.distributed.Group | None, norm: mx.array, finite: mx.array, norm_type: float
) -> None:
    """Raise the same FloatingPointError on every rank if the norm is not finite.

    Args:
        group: the ranks that agreed on the norm by a collective, all of which are here; None if it is this rank's own.
    """
    if finite.item():
        return
    mine = "; ".join(bad_leaves(grads, norm_type))
    ranks = range(group.size()) if group is not None else [init().rank]
    told = gather_text(mine, group) if group is not None else [mine]
    lines = [f"  rank {rank}: {text}" for rank, text in zip(ranks, told, strict=True) if text]
    raise FloatingPointError(
        f"The global norm of the gradients is {norm.item()}, so they cannot be clipped:\n"
        + "\n".join(lines or ["  every value is finite, but their norm does not fit float32"])
        + '\nLook for the batch or the layer that made them, or pass nonfinite="zero" or "propagate" to go on.'
    )


def bad_leaves(grads: Any, norm_type: float) -> list[str]:
    found = []
    for path, leaf in flatten(grads):
        on = stream_of(leaf, None)
        nan, inf = (mx.sum(test(leaf, stream=on), stream=on).item() for test in (mx.isnan, mx.isinf))
        counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "infinite")) if count]
        if not counts and norm_type == 2 and _values(kernels.sum_squares([leaf]))[1]:
            counts = [f"the square of {_values(kernels.max_abs([leaf]))[0]:.3g} does not fit float32"]
        if counts:
            found.append(f"'{path}' ({' and '.join(counts)})")
    return found[:5] + ([f"and {len(found) - 5} more leaves"] if len(found) > 5 else [])


def _values(pair: mx.array) -> list[float]:
    return pair.tolist()  # type: ignore[return-value]
