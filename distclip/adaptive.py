"""Adaptive gradient clipping: each unit's gradient is limited by the size of that unit's weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import mlx.core as mx

from distclip.arguments import number
from distclip.check import check_first_call
from distclip.complete import completed
from distclip.engine.streams import Stream, stream_of
from distclip.layout import Layout, LayoutError, Replicated, Sharded, group_of, place
from distclip.schedule import Schedule, schedule_of
from distclip.tree import Leaves, memo_by_prefix
from distclip.world import all_sum, init

LEAST_NORM = 1e-6  # of a unit's gradient, so that nothing is divided by 0


def adaptive_clip_grad(
    grads: Any,
    parameters: Any,
    clipping: float = 0.01,
    *,
    eps: float = 1e-3,
    layout: Layout = Replicated(),  # noqa: B008
    stream: Stream = None,
) -> Any:
    """Limit each unit's gradient norm to ``clipping * max(norm of the unit's weights, eps)``.

    Brock, De, Smith and Simonyan, 2021, "High-Performance Large-Scale Image Recognition Without Normalization"
    (https://arxiv.org/abs/2102.06171). A unit is what makes one output: a row of a linear layer, a filter of a
    convolution, an embedding's vector (MLX's weights have the outputs first); arrays of one dimension or none are one
    unit. Lazy, except with several ranks and a GPU (:mod:`distclip.schedule`), and traceable by ``mx.compile``.

    Rows that are sharded are whole units on each rank, and take no communication. Units that are cut (a
    ``ShardedToAllLinear``, a sharded bias) are measured by one all-reduce for each set of mesh axes they are cut over.

    Args:
        grads: tree of arrays, sharded or replicated as ``layout`` says, not partial.
        parameters: tree or module with the parameter of each gradient, sharded alike.
        clipping (float): the largest ratio of gradient to weights, > 0.
        eps (float): the least norm that weights count as, so that zeros can be learned.
        layout: as in :func:`distclip.clip_grad_norm`; a sharded leaf's placement must say its dimension, as those of
            :func:`distclip.layout_of` do (``Sharded("tp", dim=1)``). Default: all replicated.
        stream (mlx.core.Stream, optional): where the work runs. Default: the default device.

    Returns:
        The gradients in the same tree and types; integers as float32. A unit with NaN becomes NaN.

    Raises:
        ValueError: ``clipping`` or ``eps`` is not above 0, or a parameter is missing.
        LayoutError: a sharded leaf's dimension is not said; or at the first call that communicates: all gradients are
            equal on the ranks that share units, and called sharded.
    """
    clipping, eps = number("clipping", clipping), number("eps", eps)
    if not clipping > 0 or not eps > 0:
        raise ValueError(f"clipping and eps should be > 0, {clipping} and {eps} were provided instead")
    placed = completed(place(grads, layout, None, named=True), stream)
    leaves = placed.leaves
    weights = _weights_of(leaves, parameters)
    squares = [[_unit_squares(array, stream) for array in pair] for pair in zip(weights, leaves.arrays, strict=True)]
    cut: dict[Sharded, list[int]] = defaultdict(list)
    for i, (leaf, placement) in enumerate(zip(leaves.arrays, placed.placements, strict=True)):
        if isinstance(placement, Sharded) and _cuts_units(leaves.paths[i], leaf, placement):
            cut[placement].append(i)
    schedule = schedule_of(init().group if cut else None, stream)
    for placement, indices in cut.items():
        over = group_of(placement, init().group)
        check_first_call("adaptive_clip_grad", replace(placed, group=over, agreed=over), leaves.arrays)
        _sum_over_shards(squares, indices, placement, schedule)
    limited = [
        _limited(leaf, *squares[i], clipping=clipping, eps=eps, stream=stream_of(leaf, stream))
        for i, leaf in enumerate(leaves.arrays)
    ]
    return leaves.rebuild(limited)


def _weights_of(leaves: Leaves, parameters: Any) -> list[mx.array]:
    follow = memo_by_prefix(lambda node, key: node[key], parameters)
    weights = []
    for path, keys, leaf in zip(leaves.paths, leaves.keys, leaves.arrays, strict=True):
        try:
            weight = follow(keys)
        except (KeyError, IndexError, TypeError):
            weight = None
        if not isinstance(weight, mx.array) or weight.shape != leaf.shape:
            raise ValueError(f"Leaf '{path}' has a gradient of shape {leaf.shape}, but no parameter of that shape")
        weights.append(weight)
    return weights


def _cuts_units(path: str, leaf: mx.array, placement: Sharded) -> bool:
    """Whether a unit's values are on several ranks."""
    if placement.dim is None:
        raise LayoutError(
            f"Leaf '{path}' is called {placement}, but not which dimension is cut: say Sharded(..., dim=0) for "
            "rows (outputs), dim=1 for columns (inputs)"
        )
    return leaf.ndim < 2 or placement.dim % leaf.ndim != 0


def _sum_over_shards(squares: list[list[mx.array]], indices: list[int], placement: Sharded, schedule: Schedule) -> None:
    """Replace this rank's sums of some leaves, of weights and gradients, by those of whole units. One collective."""
    group = group_of(placement, init().group)
    together = mx.concatenate([x.reshape(-1) for i in indices for x in squares[i]], stream=schedule.stream)
    sums = all_sum(together, group)
    schedule.wait([sums])
    at = 0
    for i in indices:
        for which, x in enumerate(squares[i]):
            squares[i][which] = sums[at : at + x.size].reshape(x.shape)
            at += x.size


def _unit_squares(x: mx.array, stream: Stream) -> mx.array:
    """The sum of squares of each unit of this rank's block: float32, shape (units, 1, ...), or () for one unit."""
    wide = mx.abs(x, stream=stream_of(x, stream)).astype(mx.float32, stream=stream_of(x, stream))
    axes = list(range(1, x.ndim)) if x.ndim > 1 else None
    return mx.sum(mx.square(wide, stream=stream), axis=axes, keepdims=x.ndim > 1, stream=stream)


def _limited(
    leaf: mx.array, weight: mx.array, grad: mx.array, *, clipping: float, eps: float, stream: Stream
) -> mx.array:
    most = clipping * mx.maximum(mx.sqrt(weight), eps)
    norm = mx.sqrt(grad)
    scale = mx.where(norm > most, most / mx.maximum(norm, LEAST_NORM), mx.where(mx.isnan(norm), norm, 1.0))
    product = mx.multiply(leaf, scale, stream=stream)
    return product.astype(leaf.dtype, stream=stream) if mx.issubdtype(leaf.dtype, mx.inexact) else product
