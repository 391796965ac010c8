"""What an optimizer held before an update, and how it is put back after a step that is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Number
from typing import Any

import mlx.core as mx

from distclip.engine import kernels
from distclip.tree import Keys, dotted


class Snapshot:
    """The state of an optimizer before an update: a dict (or list) of arrays, of other values, and of dicts, lists and
    tuples of these.

    Arrays are kept by handles of their own on the same memory, which an update in place does not reach.

    Args:
        state: of the optimizer.

    Attributes:
        lazy (bool): whether a selection between arrays can undo an update of such a state: it holds arrays, text and
            None alone. A number may be a count, and another object may change in itself.
    """

    def __init__(self, state: Any) -> None:
        others: list[Any] = []
        self._saved = _saved(state, others)
        self.lazy = all(leaf is None or isinstance(leaf, str) for leaf in others)

    def compare(self, state: Any) -> Change:
        """What an update has made of the state."""
        return Change(self._saved, state)

    def put_back(self, state: Any) -> None:
        """Make a state what it was, in the containers that it has now."""
        _restored(self._saved, state)


class Change:
    """From the state before an update to the state after.

    Attributes:
        obstacle (str or None): what no selection between arrays undoes, in words.
        retyped (bool): whether an array has another type: a selection gives the wider of the two.
    """

    def __init__(self, saved: _Container, state: Any) -> None:
        self._saved, self._state = saved, state
        self._old: list[mx.array] = []
        self._new: list[mx.array] = []
        self._places: list[tuple[Any, Any]] = []  # of each new array: its container, and its key there
        self.retyped = False
        self.obstacle = self._compare(saved, state, ())

    def select(self, finite: mx.array) -> list[mx.array]:
        """Where there is no obstacle: put into the state what was before, unless ``finite``, bool, shape (), holds.

        Returns:
            The arrays that were put there.
        """
        changed = [i for i, yes in enumerate(kernels.changed(self._new, self._old)) if yes]
        selected = kernels.select(finite, [self._new[i] for i in changed], [self._old[i] for i in changed])
        tuples = False  # they are made anew, with all that holds them
        for i, array in zip(changed, selected, strict=True):
            self._new[i] = array
            container, key = self._places[i]
            if isinstance(container, (dict, list)):
                container[key] = array
            else:
                tuples = True
        if tuples:
            _filled(self._saved, self._state, iter(self._new))
        return selected

    def _compare(self, old: _Container, new: Any, keys: Keys) -> str | None:
        held = _held(new)
        if held is None:
            return f"changes '{dotted(keys)}' from {old.container!r}"
        for key, before in old.held.items():
            if key not in held:
                return f"removes '{dotted((keys, key))}'"
            now = held[key]
            if isinstance(before, mx.array) and isinstance(now, mx.array):
                if before.shape != now.shape:
                    return f"changes the shape of '{dotted((keys, key))}'"
                if before.dtype != now.dtype:
                    self.retyped = True
                self._old.append(before)
                self._new.append(now)
                self._places.append((new, key))
            elif isinstance(before, _Container):
                if obstacle := self._compare(before, now, (keys, key)):
                    return obstacle
            elif not _is_same(before, now):
                return f"changes '{dotted((keys, key))}' from {before!r}"
        if len(held) == len(old.held):
            return None
        return f"makes '{dotted((keys, next(key for key in held if key not in old.held)))}'"


class _Container:
    """A dict, list or tuple, and what it held."""

    __slots__ = ("container", "held")

    def __init__(self, container: Any, held: dict[Any, Any]) -> None:
        self.container, self.held = container, held


def _held(node: Any) -> dict[Any, Any] | None:
    """What a container holds, by key or index; None if it is none."""
    if isinstance(node, dict):
        return node
    return dict(enumerate(node)) if isinstance(node, (list, tuple)) else None


def _saved(container: Any, others: list[Any]) -> _Container:
    """A copy of a container with new handles of its arrays; leaves that are none are listed too."""
    saved: dict[Any, Any] = {}
    for key, child in (_held(container) or {}).items():
        if isinstance(child, mx.array):
            saved[key] = child.__copy__()
        elif isinstance(child, (dict, list, tuple)):
            saved[key] = _saved(child, others)
        else:
            saved[key] = child
            others.append(child)
    return _Container(container, saved)


def _filled(saved: Any, now: Any, arrays: Iterator[mx.array]) -> Any:
    """Put arrays into a tree of the same structure, in the order of the saved one."""
    if isinstance(saved, mx.array):
        return next(arrays)
    if not isinstance(saved, _Container):
        return now
    return _refilled(now, {key: _filled(child, now[key], arrays) for key, child in saved.held.items()})


def _restored(saved: Any, now: Any) -> Any:
    if not isinstance(saved, _Container):
        return saved
    present = _held(now) or {}
    held = {key: _restored(child, present.get(key)) for key, child in saved.held.items()}
    return _refilled(now if type(now) is type(saved.container) else saved.container, held)


def _refilled(container: Any, held: dict[Any, Any]) -> Any:
    """The container with other items; a tuple is made anew."""
    if isinstance(container, dict):
        if container.keys() != held.keys():
            container.clear()
        container.update(held)
    elif isinstance(container, list):
        container[:] = held.values()
    else:
        return type(container)(*held.values()) if hasattr(container, "_fields") else type(container)(held.values())
    return container


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, (Number, str)) and type(old) is type(new) and bool(old == new))
