"""Named groups of leaves, such as layers, whose norms ride in the global norm's collective."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx

from distclip.world import gather_text

Groups = Mapping[str, str | Sequence[str]] | Callable[[str], str]

OTHER = "other"


def check_groups(groups: Any, norm_type: float, *, also_measured: bool) -> None:
    """Raise TypeError unless it is None, names with patterns, or a function of a path; ValueError for a norm type that
    parts of a gradient cannot have, if groups or others (``also_measured``) are measured."""
    if norm_type not in (1, 2) and (groups is not None or also_measured):
        raise ValueError(f"groups, rank_batch and AdaGC need norm_type 1 or 2, {norm_type} was provided instead")
    if groups is None or (callable(groups) and not isinstance(groups, type)):
        return
    if isinstance(groups, Mapping):
        words = [word for name, patterns in groups.items() for word in (name, *_listed(patterns))]
        if all(isinstance(word, str) for word in words):
            return
    raise TypeError(
        f"groups is {groups!r}; pass names with patterns of leaf paths, such as {{'attention': '*.self_attn.*'}}, or a "
        "function from a path to a name"
    )


def names_of(paths: list[str], groups: Groups | None, group: mx.distributed.Group) -> list[str]:
    """The groups' names, the same list on every rank. Collective for a function, since ranks may hold different trees.

    Args:
        paths: of this rank's leaves.
        groups: names, each with a pattern or several (``fnmatch``, on dotted paths; the first that matches counts), or
            a function from a path to a name, or None for one group of all leaves.
    """
    if groups is None:
        return [OTHER]
    if isinstance(groups, Mapping):
        return list(dict.fromkeys([*groups, OTHER]))
    mine = json.dumps(sorted({str(groups(path)) for path in paths}))
    return sorted({name for text in gather_text(mine, group) for name in json.loads(text)}) or [OTHER]


def members(paths: list[str], groups: Groups, names: list[str]) -> list[int]:
    """For the path of each leaf, the number of its group; one more than the last where that has no name yet."""
    number = {name: i for i, name in enumerate(names)}
    return [number.get(_group_of(path, groups), len(names)) for path in paths]


def _group_of(path: str, groups: Groups) -> str:
    if not isinstance(groups, Mapping):
        return str(groups(path))
    patterns = ((name, pattern) for name, listed in groups.items() for pattern in _listed(listed))
    return next((name for name, pattern in patterns if fnmatchcase(path, pattern)), OTHER)


def _listed(patterns: Any) -> Sequence[Any]:
    return patterns if isinstance(patterns, (list, tuple)) else (patterns,)
