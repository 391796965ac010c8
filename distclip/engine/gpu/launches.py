"""Which leaves share a launch, and the tables that tell a kernel their shapes. Made once for a tree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from distclip.engine.gpu import source
from distclip.engine.operations import Stream

Shape = tuple[int, ...]
# MLX hands a smaller array to a kernel in Metal's constant memory, and so under another signature.
LEAST = 8


@dataclass(frozen=True, eq=False)
class Launch:
    """Leaves of a dtype that share a launch."""

    dtype: mx.Dtype
    leaves: tuple[int, ...]  # their numbers in the tree
    groups: tuple[int, ...]  # how many threadgroups each has
    table: mx.array  # int64, shape (leaves of the grouping * numbers a leaf,)

    @property
    def grid(self) -> dict[str, tuple[int, int, int]]:
        return {"grid": (sum(self.groups) * source.THREADS, 1, 1), "threadgroup": (source.THREADS, 1, 1)}


def launches(
    grouping: source.Grouping, leaves: Sequence[tuple[Shape, mx.Dtype]], factors: bool = False
) -> Iterator[Launch]:
    """The launches for leaves of these shapes and dtypes. None has empty leaves, or dtypes without a kernel.

    Args:
        grouping: how many leaves share a launch.
        leaves: their shapes and dtypes.
        factors: whether each leaf has a factor of its own, or all have the first.
    """
    alike: dict[mx.Dtype, list[int]] = defaultdict(list)
    for i, (shape, dtype) in enumerate(leaves):
        if dtype in source.VALUES and 0 not in shape:
            alike[dtype].append(i)
    for dtype, numbers in alike.items():
        for begin in range(0, len(numbers), grouping.leaves):
            share = tuple(numbers[begin : begin + grouping.leaves])
            shapes = [_passed(leaves[i][0]) for i in share]
            parts = 2 if dtype == mx.complex64 else 1
            groups = tuple(-(-math.prod(shape) * parts // grouping.chunk) for shape, _ in shapes)
            rows = _table(grouping, shapes, groups, share if factors else (0,) * len(share))
            yield Launch(dtype, share, groups, mx.array(rows, mx.int64))


def _passed(shape: Shape) -> tuple[Shape, bool]:
    """The shape of a leaf for the kernel, and whether its array has another axis in front of these."""
    small = math.prod(shape) < LEAST
    return (shape, small) if len(shape) + small <= source.AXES else ((math.prod(shape),), small)


def _table(
    grouping: source.Grouping, shapes: list[tuple[Shape, bool]], groups: tuple[int, ...], factors: tuple[int, ...]
) -> list[int]:
    rows: list[int] = []
    first = 0
    for (shape, small), count, factor in zip(shapes, groups, factors, strict=True):
        lengths = (1, *shape) if small else shape
        padding = [1] * (source.AXES - len(lengths))
        rows += [first, math.prod(shape), len(lengths), *lengths, *padding, factor][: grouping.row]
        first += count
    absent = [first, *[0] * (grouping.row - 1)]  # no threadgroup starts there
    return rows + absent * (grouping.leaves - len(shapes))


def passed(grouping: source.Grouping, launch: Launch, leaves: Sequence[mx.array], stream: Stream) -> list[mx.array]:
    """The arrays for the kernel: as many as it takes, in memory as they are, and none too small."""
    arrays = [_array(leaves[i], stream) for i in launch.leaves]
    return arrays + arrays[:1] * (grouping.leaves - len(arrays))


def _array(leaf: mx.array, stream: Stream) -> mx.array:
    shape, small = _passed(leaf.shape)
    if shape != leaf.shape:
        leaf = mx.reshape(leaf, shape, stream=stream)
    # The same values again and again: a view, of which the kernel reads the first.
    return mx.broadcast_to(leaf, (LEAST, *shape), stream=stream) if small else leaf
