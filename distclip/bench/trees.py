"""The gradients that the bench works on: their shapes, and their values in each library."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

Shape = tuple[int, ...]
BLOCK = 1 << 24  # random values before they repeat


@dataclass(frozen=True)
class Tree:
    """Shapes and dtype of the leaves, and the cases to measure with them."""

    name: str
    shapes: list[Shape]
    dtype: str
    cases: tuple[str, ...]
    weight: float = 1  # factor of the number of rounds
    small: bool = False  # time depends on the number of leaves, so that a plain read does not compare


def itemsize(dtype: str) -> int:
    return getattr(mx, dtype).size  # type: ignore[no-any-return]


def equal_leaves(megabytes: int, dtypes: list[str]) -> list[Shape]:
    """The shapes of leaves with the same number of bytes, and ``megabytes`` in all."""
    return [(megabytes * 10**6 // len(dtypes) // itemsize(dtype),) for dtype in dtypes]


def trees(megabytes: int, transformer: bool) -> list[Tree]:
    """The trees of the parts ``norm`` and ``clip``."""

    def leaves(n: int, dtype: str, *cases: str) -> Tree:
        return Tree(f"{n} x {megabytes / n:.3g} MB", equal_leaves(megabytes, [dtype] * n), dtype, cases)

    every = ("norm", "clip, given up", "no clip, given up", "clip, kept")
    large = Tree("0.5 B transformer", qwen(), "bfloat16", every[:2], weight=0.5)
    return [
        leaves(1, "float32", *every[:2]),
        leaves(256, "float32", *every),
        Tree("2,000 x 64 values", [(64,)] * 2000, "float32", every[:3], weight=3, small=True),
        Tree("LoRA of a 0.5 B transformer", lora(8), "float32", every[:2], small=True),
        leaves(256, "bfloat16", *every[:2]),
        leaves(256, "float16", *every[:2]),
        *([large] if transformer else []),
    ]


def qwen() -> list[Shape]:
    """The leaves of Qwen2.5-0.5B."""
    width, inner, kv = 896, 4864, 128
    layer: list[Shape] = [(width, width), (width,), *[(kv, width), (kv,)] * 2, (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(151936, width), *layer * 24, (width,)]


def lora(rank: int) -> list[Shape]:
    """The two factors of each matrix in the layers of Qwen2.5-0.5B."""
    matrices = [shape for shape in qwen()[1:] if len(shape) == 2]
    return [factor for rows, columns in matrices for factor in ((columns, rank), (rank, rows))]


class Grads:
    """The same values in every library. Cached gradients are for reading; those of ``fresh_...`` can be overwritten."""

    def __init__(self, shapes: list[Shape], dtypes: list[str], seed: int = 0):
        sizes = [math.prod(shape) for shape in shapes]
        self.values = sum(sizes)
        block = np.random.default_rng(seed).standard_normal(min(BLOCK, self.values), np.float32)
        values = np.split(np.resize(block, self.values), np.cumsum(sizes)[:-1])
        self.leaves: list[tuple[Any, str]] = []  # and dtypes; bfloat16 as its bits in int16: NumPy has no such type
        for leaf, dtype, shape in zip(values, dtypes, shapes, strict=True):
            narrow = (leaf.view(np.int32) >> 16).astype(np.int16) if dtype == "bfloat16" else leaf.astype(dtype)
            self.leaves.append((narrow.reshape(shape), dtype))
        self.bytes: int = sum(leaf.nbytes for leaf, _ in self.leaves)

    @cached_property
    def norm(self) -> float:
        """The norm in float64."""
        return math.sqrt(math.fsum(map(_squares, self.wide())))

    def wide(self) -> Iterator[Any]:
        """The leaves in a type that NumPy has."""
        for leaf, dtype in self.leaves:
            yield (leaf.astype(np.int32) << 16).view(np.float32) if dtype == "bfloat16" else leaf

    def fresh_mlx(self) -> list[mx.array]:
        arrays = [mx.array(leaf).view(getattr(mx, dtype)) for leaf, dtype in self.leaves]
        if mx.default_device() == mx.gpu:  # made there, as gradients are: what the host wrote may have to move first
            arrays = [array * mx.array(1, array.dtype) for array in arrays]
        mx.eval(arrays)
        return arrays

    mlx = cached_property(fresh_mlx)

    @cached_property
    def torch(self) -> list[Any]:
        import torch

        return [torch.from_numpy(leaf).view(getattr(torch, dtype)) for leaf, dtype in self.leaves]

    def fresh_jax(self) -> list[Any]:
        import jax

        typed = [leaf.view(getattr(jax.numpy, dtype)) for leaf, dtype in self.leaves]
        return jax.block_until_ready([jax.numpy.array(leaf) for leaf in typed])  # type: ignore[no-any-return]

    jax = cached_property(fresh_jax)


def average_norm(ranks: list[Grads]) -> float:
    """The norm of the mean of several ranks' gradients, in float64."""
    leaves = zip(*(grads.wide() for grads in ranks), strict=True)
    return math.sqrt(math.fsum(_squares(np.mean(alike, axis=0, dtype=np.float64)) for alike in leaves))


def _squares(x: Any) -> float:
    """The float64 sum of squares of an array, without a copy of it."""
    return float(np.einsum("i,i", x.reshape(-1), x.reshape(-1), dtype=np.float64))
