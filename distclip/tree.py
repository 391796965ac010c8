"""A gradient tree: taken apart once, at the door of a public function, and put together once, at the door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any

import mlx.core as mx

Keys = tuple[Any, ...]  # of the containers around a leaf: (keys of the outer containers, key), () at the root


class Leaves:
    """A gradient tree (dicts, lists, tuples, one array) taken apart; ``None`` leaves are left out.

    Args:
        named: whether the paths or keys of the leaves will be asked for: they are then collected in the same walk.

    Attributes:
        arrays (list of mlx.core.array): the leaves, in the order of ``mlx.utils.tree_flatten``.

    Raises:
        TypeError: a leaf is neither an ``mx.array`` nor None.
    """

    def __init__(self, tree: Any, *, named: bool = False) -> None:
        self._tree = tree
        self.arrays: list[mx.array] = []
        self._keys = _collect_named(tree, self.arrays) if named else None
        self._paths: list[str] | None = None
        if not named:
            _collect(tree, self.arrays, tree)

    @property
    def keys(self) -> list[Keys]:
        """The keys that lead to each leaf."""
        if self._keys is None:
            self._keys = _collect_named(self._tree, [])
        return self._keys

    @property
    def paths(self) -> list[str]:
        """The dotted path of each leaf."""
        if self._paths is None:
            follow = memo_by_prefix(lambda path, key: f"{path}.{key}" if path else str(key), "")
            self._paths = [follow(keys) for keys in self.keys]
        return self._paths

    def holding(self, arrays: list[mx.array]) -> Leaves:
        """The same places with other leaves, given in the same order."""
        other = copy(self)
        other.arrays = arrays
        return other

    def rebuild(self, arrays: list[mx.array]) -> Any:
        """The same tree with other leaves, given in the same order."""
        return _rebuild(self._tree, iter(arrays))


def flatten_beside(tree: Any, other: Any) -> tuple[Leaves, list[mx.array]]:
    """Take a tree apart, and find the leaves in the same places of another tree, which may hold more."""
    leaves = Leaves(tree, named=True)
    beside: list[mx.array] = []
    _collect_beside({None: tree}, {None: other}, beside)
    return leaves, beside


def memo_by_prefix(step: Callable[[Any, Any], Any], root: Any) -> Callable[[Keys], Any]:
    """A function of the keys of a leaf: ``step(step(root, first key), second key)`` and so on.

    Leaves of one container share the steps that lead to it.
    """
    return partial(_follow, step, root, {})


def _follow(step: Callable[[Any, Any], Any], root: Any, known: dict[int, Any], keys: Keys) -> Any:
    if not keys:
        return root
    outer, key = keys
    if id(outer) not in known:  # by the identity of the container's keys, which the leaves keep alive
        known[id(outer)] = _follow(step, root, known, outer)
    return step(known[id(outer)], key)


def dotted(keys: Keys) -> str:
    """The dotted path of the keys of a leaf."""
    return f"{dotted(keys[0])}.{keys[1]}".removeprefix(".") if keys else ""


def _collect(tree: Any, arrays: list[mx.array], root: Any) -> None:
    if isinstance(tree, mx.array):
        arrays.append(tree)
        return
    if tree is None:
        return
    if not isinstance(tree, (dict, list, tuple)):
        _collect_named(root, [])  # names the leaf that is no array
    for child in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(child, mx.array):
            arrays.append(child)
        else:
            _collect(child, arrays, root)


def _collect_beside(tree: Any, other: Any, beside: list[mx.array]) -> None:
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(child, mx.array):
            beside.append(other[key])
        elif child is not None:
            _collect_beside(child, other[key], beside)


def _collect_named(tree: Any, arrays: list[mx.array]) -> list[Keys]:
    every: list[Keys] = []
    _visit(tree, (), arrays, every)
    return every


def _visit(child: Any, keys: Keys, arrays: list[mx.array], every: list[Keys]) -> None:
    if isinstance(child, mx.array):
        arrays.append(child)
        every.append(keys)
    elif isinstance(child, (dict, list, tuple)):
        for key, below in child.items() if isinstance(child, dict) else enumerate(child):
            if isinstance(below, mx.array):
                arrays.append(below)
                every.append((keys, key))
            else:
                _visit(below, (keys, key), arrays, every)
    elif child is not None:
        where = f"Leaf '{dotted(keys)}'" if keys else "The gradient"
        raise TypeError(
            f"{where} is {child!r} of type {type(child).__name__}; a gradient must be an mx.array, or None where there "
            "is none. Convert it with mx.array, or take it out of the tree."
        )


def _rebuild(tree: Any, arrays: Iterator[mx.array]) -> Any:
    if isinstance(tree, dict):
        return {key: _rebuild(child, arrays) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [_rebuild(child, arrays) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return None if tree is None else next(arrays)
