"""A gradient tree, taken apart into its leaves and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Leaf = tuple[str, mx.array]


def arrays(grads: Any) -> list[mx.array]:
    """The leaves of a gradient tree without their paths, in the order of :func:`flatten`.

    Raises:
        TypeError: a leaf is neither an ``mx.array`` nor None.
    """
    leaves: list[mx.array] = []
    if not _collect(grads, leaves):
        flatten(grads)  # names the leaf that is none
    return leaves


def _collect(tree: Any, leaves: list[mx.array]) -> bool:
    if isinstance(tree, mx.array):
        leaves.append(tree)
        return True
    if isinstance(tree, dict):
        return all([_collect(child, leaves) for child in tree.values()])
    if isinstance(tree, (list, tuple)):
        return all([_collect(child, leaves) for child in tree])
    return tree is None


def flatten(grads: Any) -> list[Leaf]:
    """The leaves of a gradient tree with their dotted paths; ``None`` leaves are left out.

    Raises:
        TypeError: a leaf is neither an ``mx.array`` nor None.
    """
    leaves = []
    for path, leaf in tree_leaves(grads):
        if isinstance(leaf, mx.array):
            leaves.append((path, leaf))
        elif leaf is not None:
            raise TypeError(
                f"Leaf '{path}' is {leaf!r} of type {type(leaf).__name__}; a gradient must be an mx.array, or None "
                "where there is none. Convert it with mx.array, or take it out of the tree."
            )
    return leaves


def rebuild(grads: Any, leaves: list[mx.array]) -> Any:
    """A tree like ``grads`` with other leaves, given in the order of :func:`flatten`; ``None`` leaves stay None."""
    return _rebuilt(grads, iter(leaves))


def _rebuilt(tree: Any, in_order: Iterator[mx.array]) -> Any:
    if isinstance(tree, dict):
        return {key: _rebuilt(child, in_order) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [_rebuilt(child, in_order) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return None if tree is None else next(in_order)


def tree_leaves(tree: Any) -> list[tuple[str, Any]]:
    flat: Any = tree_flatten(tree)  # a list, unless it is given a destination
    return flat  # type: ignore[no-any-return]
