"""Clipping by the global norm and by value: pure functions, from gradients to gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip.arguments import check, check_gradients, scalar
from distclip.check import check_first_call
from distclip.complete import completed
from distclip.engine.streams import Stream, stream_of
from distclip.layout import Layout, Sharded, place
from distclip.mesh import Group
from distclip.norm import norm_of
from distclip.policy import check_policy, checked_max_norm, factor_of, raise_if_bad
from distclip.schedule import schedule_of
from distclip.tree import Leaves
from distclip.world import init


def clip_grad_norm(
    grads: Any,
    max_norm: float | mx.array,
    *,
    layout: Layout = Sharded(),  # noqa: B008
    group: Group | None = None,
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    stream: Stream = None,
) -> tuple[Any, mx.array]:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, where ``norm`` is their global norm.

    In one process it equals ``mlx.optimizers.clip_grad_norm``, from which it takes its arguments, its scale and its
    treatment of types. On several ranks the norm is that of the whole model (one collective, none when every leaf is
    replicated), and every rank scales by the same bits. Lazy, and traceable by ``mx.compile``, except with ``"raise"``;
    the first call evaluates and compares, as :func:`distclip.global_norm` does.

    With several ranks and a GPU the host waits for the norm, since a GPU that waits for a late rank is killed on macOS
    (:mod:`distclip.schedule`). Gradients that need no scaling are then returned as they are, the same arrays.

        >>> import mlx.core as mx
        >>> grads = {"w1": mx.array([2, 3]), "w2": mx.array([1])}
        >>> clipped, norm = clip_grad_norm(grads, max_norm=2.0)
        >>> print(round(norm.item(), 4), clipped["w2"].dtype)
        3.7417 mlx.core.float32

    Args:
        grads: tree of arrays of any shapes and dtypes, sharded or replicated as ``layout`` says, not partial (see
            :func:`distclip.average_and_clip`); ``None`` leaves stay None.
        max_norm (float or scalar array): the largest norm allowed, the same on every rank. 0 makes zeros, infinity
            clips nothing. The value of an array is not looked at: a negative one counts as 0.
        layout: a placement for all leaves, a tree prefix of placements, or a callable ``(path, array) -> placement``.
            Default: every rank of the group holds another shard.
        group (Group, World or axis, optional): the ranks that hold the gradient together. Default: the world.
        norm_type (float): p of the p-norm, any p > 0 and ``math.inf``. Default: ``2.0``.
        nonfinite (str): what a norm that is not finite does, on every rank alike. ``"propagate"``: as in MLX, a NaN
            makes every gradient NaN, an infinity makes finite gradients 0. ``"raise"``: every rank raises (evaluates
            the norm). ``"zero"``: every gradient becomes zero.
        stream (mlx.core.Stream, optional): where this rank's passes over the gradients run. Default: the default
            device.

    Returns:
        (tree, mlx.core.array): the gradients in the same tree, floating types kept, integers as float32; and the norm
        before clipping, float32, shape ().

    Raises:
        ValueError: ``max_norm`` is negative or NaN, ``norm_type`` is not above 0, ``nonfinite`` is no policy.
        FloatingPointError: with ``"raise"``: names the ranks and the leaves; the same on every rank, except that with
            a replicated layout, where nothing is sent, each rank judges its own copy.
        LayoutError, TypeError: see :func:`distclip.global_norm`.
    """
    max_norm = checked_max_norm(max_norm)
    check_policy(nonfinite)
    placed = place(grads, layout, group)
    arrays = completed(placed, stream).leaves.arrays
    check_first_call("clip_grad_norm", placed, arrays)
    schedule = schedule_of(placed.agreed, stream)
    norm, finite = norm_of(arrays, placed, norm_type, stream)
    if nonfinite == "raise":
        raise_if_bad(placed, norm, finite, norm_type)
    factor, flag = factor_of(norm, finite if nonfinite == "zero" else None, max_norm, schedule)
    return placed.leaves.rebuild(schedule.scale(arrays, factor, flag)), norm


def clip_grads_with_norm(
    grads: Any, max_norm: float | mx.array, norm: float | mx.array, *, stream: Stream = None
) -> Any:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))`` for a norm that is known already.

    The same scaling as :func:`clip_grad_norm`, without measuring and without communication. With several ranks and a
    GPU the host waits for the norm.

    Args:
        grads: tree of arrays of any shapes and dtypes.
        max_norm (float or scalar array): the largest norm allowed.
        norm (float or scalar array): the global norm of ``grads``, the same on every rank.
        stream (mlx.core.Stream, optional): where the scaling runs. Default: the default device.

    Returns:
        The gradients in the same tree, floating types kept, integers as float32.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
    """
    max_norm, norm = checked_max_norm(max_norm), scalar("norm", norm)
    check_gradients(grads)
    leaves = Leaves(grads)
    schedule = schedule_of(init().group, stream)
    with schedule.arithmetic():
        whole = mx.array(norm, mx.float32).reshape(())
    factor, _ = factor_of(whole, None, max_norm, schedule)
    return leaves.rebuild(schedule.scale(leaves.arrays, factor))


def clip_grad_value(grads: Any, clip_value: float | mx.array, *, stream: Stream = None) -> Any:
    """Limit every value to ``[-clip_value, clip_value]``. No communication: each value stands alone.

    The counterpart of ``torch.nn.utils.clip_grad_value_``. A NaN stays NaN; an infinity becomes the limit.

        >>> import mlx.core as mx
        >>> print(clip_grad_value({"w": mx.array([-3.0, 0.5])}, 1.0)["w"])
        array([-1, 0.5], dtype=float32)

    Args:
        grads: tree of real arrays of any shapes and dtypes; ``None`` leaves stay None.
        clip_value (float or scalar array): the largest magnitude allowed. The value of an array is not looked at.
        stream (mlx.core.Stream, optional): where it runs. Default: the default device.

    Returns:
        The gradients in the same tree; floating types are kept, integers become float32.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.
        TypeError: a leaf is complex (complex values have no order), or no array.
    """
    limit = scalar("clip_value", clip_value)
    check(isinstance(limit, mx.array) or limit >= 0, "clip_value should be >= 0", clip_value)
    check_gradients(grads)
    leaves = Leaves(grads)
    for i, leaf in enumerate(leaves.arrays):
        if leaf.dtype == mx.complex64:
            raise TypeError(
                f"Leaf '{leaves.paths[i]}' is complex, and complex values have no order. Clip it by norm instead."
            )

    def limited(leaf: mx.array) -> mx.array:
        dtype = leaf.dtype if mx.issubdtype(leaf.dtype, mx.floating) else mx.float32
        on = stream_of(leaf, stream)
        low, high = (mx.array(value, dtype).reshape(()) for value in (-limit, limit))
        return mx.clip(leaf.astype(dtype, stream=on), low, high, stream=on)

    return leaves.rebuild([limited(leaf) for leaf in leaves.arrays])
