"""Ranks agree on a tree before they add up its leaves: on the leaves, and on the order in which these are sent."""

from __future__ import annotations

import json
import struct
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any

import mlx.core as mx

from distclip.engine import kernels
from distclip.engine.graph import order_of_making
from distclip.layout import LayoutError
from distclip.schedule import Schedule
from distclip.world import all_gather, gather_text


def agree(
    paths: list[str], arrays: list[mx.array], group: mx.distributed.Group, schedule: Schedule
) -> list[int] | None:
    """Check that every rank holds the same leaves, and agree on the order in which they are sent; None if they are sent
    when the results are evaluated.

    Where the host waits anyway, each call compares, while the device begins with the backward pass.
    """
    tree = tuple((path, x.shape, x.dtype) for path, x in zip(paths, arrays, strict=True))
    if not schedule.waits:
        _checked(tree, "mlx" if kernels.native_kernel(schedule.stream) is None else "native", group)
        return None
    order = _orders.get((tree, group)) or order_of_making(arrays)
    if order is None:
        order = list(range(len(arrays)))
    else:
        _orders[tree, group] = order
    mx.async_eval([arrays[i] for i in order[:1]])
    if not check_same_tree(_lines(tree, "on a GPU"), group, str(order)):
        order = _orders[tree, group] = json.loads(gather_text(json.dumps(order), group)[0])
    return order


_Tree = tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]
_orders: dict[tuple[_Tree, mx.distributed.Group], list[int]] = {}  # in which the leaves of a tree are sent


@cache  # none is forgotten: a rank that forgets alone would compare alone
def _checked(tree: _Tree, engine: str, group: mx.distributed.Group) -> None:
    # The native kernel sends other buckets, so ranks with and without it would add up what does not belong together.
    check_same_tree(_lines(tree, engine), group)


@lru_cache(maxsize=128)  # asked for in each step where the host waits
def _lines(tree: _Tree, engine: str) -> list[str]:
    lines = [f"{path}: {describe(dtype, shape)}" for path, shape, dtype in tree]
    return [f"(engine: {engine}, see DISTCLIP_ENGINE)", *lines]


def check_same_tree(lines: list[str], group: mx.distributed.Group, order: str = "") -> bool:
    """Raise, on every rank alike, if the ranks' trees, described by one line per leaf, differ. One tiny all-gather.

    Args:
        order: of the leaves, which may differ.

    Returns:
        Whether all ranks gave the same order.

    Raises:
        LayoutError: names the leaves and the ranks.
    """
    mine = digest("\n".join([*lines, order]))
    gathered: Any = all_gather(mx.array([mine], mx.uint32), group).tolist()
    if len({tuple(row) for row in gathered}) == 1:
        return True
    trees = [json.loads(text) for text in gather_text(json.dumps(lines), group)]
    if all(tree == lines for tree in trees):
        return False
    differing = []
    for line in sorted(set().union(*trees)):
        holders = [rank for rank, tree in enumerate(trees) if line in tree]
        if len(holders) < len(trees):
            differing.append(f"  {line} is on {in_words(holders)} and not on {in_words(others(holders, len(trees)))}")
    differing = differing or ["  the leaves are the same, in another order"]
    raise LayoutError(
        "Gradients can be added up only when every rank holds the same leaves, and these differ:\n"
        + first_ten(differing)
    )


def describe(dtype: mx.Dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('mlx.core.')} {shape}"


def digest(text: str) -> tuple[int, int]:
    return struct.unpack("<II", blake2b(text.encode(), digest_size=8).digest())


def first_ten(lines: list[str]) -> str:
    return "\n".join(lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []))


def in_words(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def others(ranks: list[int], size: int) -> list[int]:
    return [rank for rank in range(size) if rank not in ranks]
