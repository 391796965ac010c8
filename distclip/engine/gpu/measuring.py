"""Measure leaves on a GPU: a launch for up to 14 of them, one array to the CPU, where float64 sums by leaf end it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from distclip.engine.gpu import source
from distclip.engine.gpu.launches import Launch, Shape, launches, passed
from distclip.engine.streams import Stream, working_on

# The powers of two by which measure.h multiplies values, undone.
LARGE, SMALL = 2.0**77, 2.0**-88
WEIGHTS = {
    "squares": [1.0, 1.0, LARGE**2, LARGE**2, SMALL**2, SMALL**2],
    "magnitudes": [1.0, 1.0, LARGE, LARGE, SMALL, SMALL],
    "largest": [1.0, 1.0, LARGE, LARGE, SMALL, SMALL],
}


@dataclass(frozen=True, eq=False)
class Plan:
    """How leaves of given shapes and dtypes are measured."""

    launches: list[Launch]
    leaf_of: mx.array  # the leaf of each threadgroup, in the order of the launches: int32, shape (threadgroups,)
    first: tuple[int, ...]  # the first threadgroup of each leaf; -1 if it is empty
    first_of: mx.array  # the same: int32, shape (leaves,)


def measure(kind: str, leaves: list[mx.array], stream: Stream) -> mx.array:
    """The measure of each leaf, and how many of its values are not finite.

    Args:
        kind: of :data:`source.KINDS`.
        leaves, stream: as in :func:`distclip.engine.kernels.sum_squares`.

    Returns:
        mlx.core.array: float64, shape (leaves, 2).
    """
    leaves = [_float(kind, leaf, stream) for leaf in leaves]
    plan = _plan(tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if not plan.launches:
        return mx.zeros((len(leaves), 2), mx.float64, stream=mx.cpu)
    # The function's own bookkeeping goes to the default stream, and MLX would wait if that were another one.
    with working_on(stream):
        measured = _differentiable(kind, plan, stream)(leaves)
    return _by_leaf(kind, measured, plan)


def _float(kind: str, leaf: mx.array, stream: Stream) -> mx.array:
    if leaf.dtype == mx.complex64 and kind != "squares":
        return mx.abs(leaf, stream=stream)
    return leaf if leaf.dtype in source.VALUES else leaf.astype(mx.float32, stream=stream)


@lru_cache(maxsize=64)
def _plan(leaves: tuple[tuple[Shape, mx.Dtype], ...]) -> Plan:
    every = list(launches(source.MEASURE, leaves))
    counts = [(leaf, count) for launch in every for leaf, count in zip(launch.leaves, launch.groups, strict=True)]
    leaf_of = [leaf for leaf, count in counts for _ in range(count)]
    first = [-1] * len(leaves)
    for group in reversed(range(len(leaf_of))):
        first[leaf_of[group]] = group
    return Plan(every, mx.array(leaf_of, mx.int32), tuple(first), mx.array(first, mx.int32))


def columns(kind: str, leaves: list[mx.array], plan: Plan, stream: Stream) -> mx.array:
    """What the kernel measures: float32, shape (threadgroups, 8), on the GPU. See measure.h."""
    partial = []
    for launch in plan.launches:
        kernel = source.kernel(source.measuring(kind, launch.dtype, source.backend()))
        partial += kernel(
            inputs=[*passed(source.MEASURE, launch, leaves, stream), launch.table],
            output_shapes=[(sum(launch.groups), source.COLUMNS)],
            output_dtypes=[mx.float32],
            stream=stream,
            **launch.grid,
        )
    return partial[0] if len(partial) == 1 else mx.concatenate(partial, stream=stream)  # one array goes to the CPU


def _by_leaf(kind: str, columns: mx.array, plan: Plan) -> mx.array:
    leaves = plan.first_of.size
    with mx.stream(mx.cpu):
        wide = columns.astype(mx.float64)  # crosses once: all else comes from this
        exact = mx.stop_gradient(wide)
        terms = exact * mx.array([*WEIGHTS[kind], 0.0, 0.0], mx.float64)
        rows = mx.max(terms, axis=1) if kind == "largest" else mx.sum(terms, axis=1)
        parts = mx.concatenate([rows[:, None], exact[:, -2:]], axis=1)
        value, nonfinite, nans = mx.split(mx.zeros((leaves, 3), mx.float64).at[plan.leaf_of].add(parts), 3, axis=1)
        if kind == "largest":
            value = mx.zeros((leaves, 1), mx.float64).at[plan.leaf_of].maximum(rows[:, None])
        value = mx.where(nonfinite > 0, mx.where(nans > 0, math.nan, math.inf), value)
        return mx.concatenate([value + _slope(wide, plan), nonfinite], axis=1)


def _slope(columns: mx.array, plan: Plan) -> mx.array:
    """Zeros with the derivative that a leaf's first row has in its first column: float64, shape (leaves, 1)."""
    first = mx.take(columns[:, :1], mx.maximum(plan.first_of, 0), axis=0)
    first = mx.where(plan.first_of[:, None] >= 0, first, 0.0)
    return first - mx.stop_gradient(first)


# ------------------------------------------------------------------------------------------------- derivatives

Columns = Callable[[list[mx.array]], mx.array]


def _differentiable(kind: str, plan: Plan, stream: Stream) -> Columns:
    """:func:`columns`, with the derivatives of MLX operations that have the same sums. Kernels have none."""

    def operations(leaves: list[mx.array]) -> mx.array:
        return _columns_by_operations(kind, leaves, plan, stream)

    def measured(leaves: list[mx.array]) -> mx.array:
        return columns(kind, leaves, plan, stream)

    def vjp(leaves: list[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        return mx.vjp(lambda *x: operations(list(x)), leaves, [cotangent])[1]

    def jvp(leaves: list[mx.array], tangents: list[mx.array]) -> mx.array:
        return mx.jvp(lambda *x: operations(list(x)), leaves, tangents)[1][0]

    def vmap(leaves: list[mx.array], axes: list[int | None]) -> tuple[mx.array, int]:
        return mx.vmap(operations, in_axes=axes)(leaves), 0

    function: Any = mx.custom_function(measured)
    function.vjp(vjp)
    function.jvp(jvp)
    function.vmap(vmap)
    return function  # type: ignore[no-any-return]


def _columns_by_operations(kind: str, leaves: list[mx.array], plan: Plan, stream: Stream) -> mx.array:
    """Columns that add up to the same, by leaf: the measure of each leaf in its first row."""
    zero = mx.zeros((), mx.float32, stream=stream)
    sums = [zero] * plan.leaf_of.size
    for leaf, row in zip(leaves, plan.first, strict=True):
        if row >= 0:
            sums[row] = _value(kind, leaf, stream)
    column = mx.expand_dims(mx.stack(sums, stream=stream), 1, stream=stream)
    return mx.pad(column, [(0, 0), (0, source.COLUMNS - 1)], stream=stream)


def _value(kind: str, leaf: mx.array, stream: Stream) -> mx.array:
    if leaf.dtype == mx.complex64:
        leaf = mx.stack([mx.real(leaf, stream=stream), mx.imag(leaf, stream=stream)], stream=stream)
    wide = leaf.astype(mx.float32, stream=stream)
    if kind == "squares":
        return mx.sum(mx.square(wide, stream=stream), stream=stream)
    return (mx.max if kind == "largest" else mx.sum)(mx.abs(wide, stream=stream), stream=stream)
