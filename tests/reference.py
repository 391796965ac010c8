"""What the tests compare with: the truth in float64 NumPy, made from data that every rank can make for all ranks."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

import distclip as dc
from distclip.engine import kernels

Array = NDArray[Any]

WORLD = dc.init()
several = pytest.mark.skipif(WORLD.size == 1, reason="needs ranks that can differ")
alone = pytest.mark.skipif(WORLD.size > 1, reason="about one process")

FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
DTYPES = {**FLOATS, "complex64": mx.complex64, "float64": mx.float64, "int32": mx.int32, "bool": mx.bool_}
# Of float64 too: a norm and a scale are float32.
EPSILON = {mx.float32: 2**-23, mx.bfloat16: 2**-7, mx.float16: 2**-10, mx.complex64: 2**-23, mx.float64: 2**-23}

PLAYED = os.environ.get("PLAY_DEVICE") in ("gpu", "mlx")  # by the CPU, where a sum of MLX is a single running one
SUM_ERROR = 1e-4 if PLAYED else 1e-6  # of float32 sums
# The relative error of a norm of degree 1, 2 or infinity: one rounding to float32, or float32 sums besides.
NORM_ERROR = SUM_ERROR if kernels.engine() == "mlx" else 1e-7


@functools.cache
def mesh(**axes: int) -> dc.Mesh:
    """One mesh per program for the same axes: making a mesh is collective, and it stays."""
    return dc.Mesh(**axes)


def line() -> dc.Mesh:
    """All ranks on one axis, "x": a mesh for every number of ranks and every backend."""
    return mesh(x=WORLD.size)


def square() -> dc.Mesh:
    return mesh(dp=2, tp=2)


def normal(
    shape: Iterable[int], seed: int | tuple[int, ...], dtype: mx.Dtype = mx.float32, at: float = 1.0
) -> mx.array:
    """Normal values around a magnitude; whole numbers for integers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(tuple(shape)) * at
    if dtype == mx.complex64:
        return mx.array((values + 1j * at * rng.standard_normal(tuple(shape))).astype(np.complex64))
    if dtype == mx.float64:
        return mx.array(values, mx.float64)
    if dtype == mx.bool_:
        return mx.array(values > 0)
    if not mx.issubdtype(dtype, mx.inexact):
        return mx.array(np.rint(values * 10).astype(np.int32)).astype(dtype)
    return mx.array(values.astype(np.float32)).astype(dtype)


def leaves(tree: Any) -> list[mx.array]:
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in flat if leaf is not None]


def wide(leaf: mx.array) -> Array:
    """A leaf's exact values, in float64 or complex128."""
    with np.errstate(invalid="ignore"):  # a signaling NaN is quieted
        if leaf.dtype == mx.complex64:
            return np.array(leaf).astype(np.complex128)
        return np.array(leaf if leaf.dtype == mx.float64 else leaf.astype(mx.float32)).astype(np.float64)


def powers64(tree: Any, p: float = 2.0) -> float:
    """The sum of ``|x|**p`` over a tree; the largest ``|x|`` for an infinite p."""
    values = [np.abs(wide(leaf)).reshape(-1) for leaf in leaves(tree)]
    if math.isinf(p):
        return max((float(v.max()) for v in values if v.size), default=0.0)
    return math.fsum(float(np.dot(v, v) if p == 2 else (v**p).sum()) for v in values)


def norm64(tree: Any, p: float = 2.0) -> float:
    total = powers64(tree, p)
    return total if math.isinf(p) else math.pow(total, 1 / p)


def relative(found: mx.array | float, truth: float) -> float:
    value = float(found)
    return abs(value - truth) / truth if truth else abs(value)


def assert_close(found: mx.array, truth: Array, rtol: float | None = None) -> None:
    """Equal within two roundings of the leaf's type, or ``rtol``, of the largest value."""
    rtol = 2 * EPSILON[found.dtype] if rtol is None else rtol
    np.testing.assert_allclose(wide(found), truth, rtol=rtol, atol=rtol * float(np.abs(truth).max(initial=0.0)) / 8)


def same_bits(tree: Any) -> bool:
    """Whether all ranks hold the same bits; every rank must ask for a tree of the same shapes."""
    for leaf in leaves(tree):
        bits = leaf.reshape(-1).view(mx.uint8)[None]
        if not np.all(np.array(mx.distributed.all_gather(bits, group=WORLD.group)) == np.array(bits)):
            return False
    return True


def told_by_all(text: str) -> list[str]:
    """What each rank says, at most 8,000 bytes."""
    raw = np.frombuffer(text.encode().ljust(8000)[:8000], np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(raw)[None], group=WORLD.group))
    return [row.tobytes().decode().rstrip() for row in gathered]
