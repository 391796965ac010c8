"""The gradients that the bench works on: their shapes, and their values in each library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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

    @property
    def values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def small(self) -> bool:
        """Whether time depends on the number of leaves, so that a plain read does not compare."""
        return max(math.prod(shape) for shape in self.shapes) <= 64

    @property
    def bytes(self) -> int:
        return self.values * (4 if self.dtype == "float32" else 2)


def trees(megabytes: int, transformer: bool) -> list[Tree]:
    """The trees of the parts ``norm`` and ``clip``."""

    def leaves(n: int, dtype: str, *cases: str) -> Tree:
        size = max(megabytes * 10**6 // n // (4 if dtype == "float32" else 2), 1)
        return Tree(f"{n} x {megabytes / n:.3g} MB", [(size,)] * n, dtype, cases)

    every = ("norm", "clip, given up", "no clip, given up", "clip, kept")
    small = [
        leaves(1, "float32", "norm", "clip, given up"),
        leaves(256, "float32", *every),
        Tree("2,000 x 64 values", [(64,)] * 2000, "float32", every[:3], weight=3),
        leaves(256, "bfloat16", "norm", "clip, given up"),
        leaves(256, "float16", "norm", "clip, given up"),
    ]
    large = Tree("0.5 B transformer", qwen(), "bfloat16", every[:2], weight=0.5)
    return [*small, large] if transformer else small


def qwen() -> list[Shape]:
    """The leaves of Qwen2.5-0.5B."""
    width, inner, kv = 896, 4864, 128
    layer: list[Shape] = [(width, width), (width,), *[(kv, width), (kv,)] * 2, (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(151936, width), *layer * 24, (width,)]


class Grads:
    """The same values in every library. Cached gradients are for reading; those of ``fresh_...`` can be overwritten."""

    def __init__(self, shapes: Iterable[Shape], dtypes: Iterable[str], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.shapes, self.dtypes = list(shapes), list(dtypes)
        sizes = [math.prod(shape) for shape in self.shapes]
        block = rng.standard_normal(min(BLOCK, sum(sizes)), np.float32)
        self.raw: list[Any] = []  # bfloat16 as its bits, since NumPy has no such type
        start = 0
        for size, shape, dtype in zip(sizes, self.shapes, self.dtypes, strict=True):
            fits = start + size <= block.size
            values = block[start : start + size] if fits else np.resize(block, size)
            start = (start + size) % block.size
            self.raw.append(_narrow(values, dtype).reshape(shape))
        self.bytes: int = sum(leaf.nbytes for leaf in self.raw)
        self.values = sum(sizes)

    @cached_property
    def norm(self) -> float:
        """The norm in float64."""
        return math.sqrt(math.fsum(squares(_wide(raw, dtype)) for raw, dtype in self._leaves()))

    def _leaves(self) -> Iterator[tuple[Any, str]]:
        return zip(self.raw, self.dtypes, strict=True)

    def fresh_mlx(self) -> list[mx.array]:
        arrays = [
            mx.array(raw).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(raw) for raw, dtype in self._leaves()
        ]
        mx.eval(arrays)
        return arrays

    @cached_property
    def mlx(self) -> list[mx.array]:
        return self.fresh_mlx()

    @cached_property
    def torch(self) -> list[Any]:
        import torch

        return [
            torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(raw)
            for raw, dtype in self._leaves()
        ]

    def fresh_jax(self) -> list[Any]:
        import jax
        import ml_dtypes

        typed = [raw.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else raw for raw, dtype in self._leaves()]
        return jax.block_until_ready([jax.numpy.array(leaf) for leaf in typed])  # type: ignore[no-any-return]

    @cached_property
    def jax(self) -> list[Any]:
        return self.fresh_jax()


def average_norm(ranks: list[Grads]) -> float:
    """The norm of the mean of several ranks' gradients, in float64."""
    total = 0.0
    for i, dtype in enumerate(ranks[0].dtypes):
        total += squares(sum(_wide(grads.raw[i], dtype).astype(np.float64) for grads in ranks) / len(ranks))
    return math.sqrt(total)


def squares(x: Any) -> float:
    """The float64 sum of squares of an array."""
    blocks = (block.astype(np.float64) for block in np.array_split(x.reshape(-1), x.size // BLOCK + 1))
    return math.fsum(float(np.dot(block, block)) for block in blocks)


def _narrow(values: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return values.astype(dtype)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _wide(raw: Any, dtype: str) -> Any:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype == "bfloat16" else raw
