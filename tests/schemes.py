"""Gradients under each scheme of parallelism, from numbers that all ranks know, with a bad value where wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from reference import WORLD, leaves, normal, square, wide

import distclip as dc
from distclip.engine import kernels

N = WORLD.size
NATIVE = kernels.engine() == "native"
EXACT = kernels.engine() != "mlx"  # whose squares need not fit float32
LAYOUT = {"s": dc.Sharded(), "r": dc.Replicated()}
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Scheme:
    """A tree {"s": {"w", "b"}, "r"} whose leaves are placed on the ranks by one scheme of parallelism.

    Args:
        place: for a rank which partial gradient it has, and which block of the leaves below "s" and of "r".
        partials, blocks, replicas: how many of each there are.
        options: of a Clipper for it.
    """

    place: Callable[[int], tuple[int, int, int]]
    partials: int
    blocks: int
    replicas: int
    options: Callable[[], dict[str, Any]]

    def grads(self, step: int, rank: int = WORLD.rank, at: float = 1.0) -> dict[str, Any]:
        """What a rank has in a step."""
        partial, block, replica = self.place(rank)
        return self._tree(step, partial, block, replica, at)

    def norm(self, step: int) -> float:
        """The norm of the whole gradient in float64, each block of the average once."""
        total = 0.0
        for part, count in (("s", self.blocks), ("r", self.replicas)):
            for block in range(count):
                held = [leaves(self._tree(step, i, block, block, 1.0)[part]) for i in range(self.partials)]
                means = [sum(map(wide, same)) / self.partials for same in zip(*held, strict=True)]
                total += sum(float(np.square(mean).sum()) for mean in means)
        return math.sqrt(total)

    def spoiled(self, step: int, value: float, bad: int) -> dict[str, Any]:
        """As ``grads``, with a value in one place of one rank's gradient (of all copies of a replica)."""
        grads = self.grads(step)
        if WORLD.rank == bad or self.partials == self.blocks == 1:
            grads["s"]["w"][1, 2] = value
        return grads

    def parameters(self) -> dict[str, Any]:
        """Of the places of the gradients, which all ranks that hold one hold alike."""
        _, block, replica = self.place(WORLD.rank)
        return self._tree(-1, 99, block, replica, 1.0)

    @staticmethod
    def _tree(step: int, partial: int, block: int, replica: int, at: float) -> dict[str, Any]:
        seed = (step + 1, partial)
        return {
            "s": {"w": normal((4, 3), (*seed, block, 1), at=at), "b": normal((3,), (*seed, block, 2), at=at)},
            "r": normal((6,), (*seed, replica, 3), at=at),
        }


SCHEMES = {
    "sharded": Scheme(lambda r: (0, r, r), 1, N, N, lambda: {}),
    "replicated": Scheme(lambda r: (0, 0, 0), 1, 1, 1, lambda: {"layout": dc.Replicated()}),
    "averaged": Scheme(lambda r: (r, 0, 0), N, 1, 1, lambda: {"average": True}),
    "mixed": Scheme(lambda r: (0, r, 0), 1, N, 1, lambda: {"layout": LAYOUT}),
    "on a mesh": Scheme(
        lambda r: (r // 2, r % 2, 0),
        *(2, 2, 1),
        lambda: {
            "average": square().group("dp"),
            "layout": {"s": dc.Sharded("tp", mesh=square()), "r": dc.Replicated()},
        },
    ),
}
every_scheme = pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(scheme, id=name, marks=[pytest.mark.mpi(min_size=4)] * (name == "on a mesh"))
        for name, scheme in SCHEMES.items()
    ],
)


def in_order(tree: Any) -> list[mx.array]:
    """The leaves in the order of their paths: neither a file nor MLX's merging of trees keeps another."""
    flat: Any = tree_flatten(tree)
    return [leaf for _, leaf in sorted(flat, key=lambda leaf: leaf[0])]


def bits(tree: Any) -> list[bytes]:
    found = in_order(tree)
    mx.eval(found)
    return [np.array(mx.contiguous(leaf).reshape(-1).view(mx.uint8)).tobytes() for leaf in found]


def culprits(value: float) -> list[int]:
    """Ranks to plant a value on: the first and the last, one of them for one kind of value."""
    return [0] if math.isinf(value) else [N - 1]
