"""Leaves that take a kernel through all of its branches, and what it makes of them, to the bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from reference import Array, normal

from distclip.engine.gpu import measuring

from . import Emulation, emulated

SHAPES = [(300, 200), (8,), (70_000,), (1, 9), (64,), (129, 65), (10, 11, 12), (100_000,), (33,), (1023,), (65_536,)]
SHAPES += [(65_537,), (17, 4000), (12,), (3,)]


def launched(dtype: mx.Dtype) -> list[mx.array]:
    """Leaves of two launches, every third transposed, of magnitudes that take all branches, some not finite."""
    at = [1.0] if dtype == mx.float16 else [1e-30, 1e-3, 1.0, 1e3, 1e30, 1e-40]
    leaves = [normal(shape, i, dtype, at=at[i % len(at)]) for i, shape in enumerate(SHAPES)]
    leaves = [x if i % 3 else mx.transpose(x) for i, x in enumerate(leaves)]
    leaves[6] = mx.where(leaves[6] == leaves[6][3, 4, 5], mx.array(np.inf, dtype), leaves[6])
    mx.eval(leaves)
    return leaves


def columns(kind: str, leaves: list[mx.array], emulation: Emulation) -> Array:
    """What the kernel writes, to the bit."""
    with emulated(emulation):
        plan = measuring._plan(tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        return np.array(measuring.columns(kind, leaves, plan, None))
