"""Where the ranks' leaves contradict the layout: what each leaf is called, what it looks like, what to call it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx

from distclip.agree import in_words
from distclip.digests import Key, Row, from_bits
from distclip.layout import WrongLeaf
from distclip.mesh import MESHES

DRIFT = 1e-3  # copies whose distance is at most this share of their norm were the same: they drifted apart

Rows = dict[int, Row]  # of a leaf, by rank
Axes = dict[str, list[int]]  # the place of each rank of the group on each axis


@dataclass
class Found:
    """What contradicts the layout in a leaf.

    Attributes:
        placements: the ranks place it differently.
        missing, shapes, apart: copies of a block of which some are missing, have other shapes, or differ: their ranks.
        same: ranks of different blocks that hold the same values.
    """

    placements: bool = False
    missing: list[list[int]] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    apart: list[list[int]] = field(default_factory=list)
    same: list[list[int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    @property
    def of_trees(self) -> bool:
        """Whether trees, shapes or layouts contradict each other, whatever the values are."""
        return bool(self.placements or self.missing or self.shapes)

    def is_drift(self, rows: Rows) -> bool:
        """Whether copies differ by a small share of their norm, and nothing else is wrong."""
        return not (self.of_trees or self.same) and all(are_near(rows, ranks) for ranks in self.apart)


def by_leaf(tables: list[dict[Key, Row]]) -> dict[Key, Rows]:
    """The rows of each leaf, from the rows of each rank."""
    leaves: dict[Key, Rows] = defaultdict(dict)
    for rank, table in enumerate(tables):
        for key, row in table.items():
            leaves[key][rank] = row
    return leaves


def judge(rows: Rows, shards_differ: bool) -> Found:
    """What contradicts the layout in a leaf. Shards may be the same unless they should differ."""
    if len({row.placement for row in rows.values()}) > 1:
        return Found(placements=True)
    found = Found()
    by_values: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, row in rows.items():
        if row.comparable:
            by_values[(row.shape, *row.values)].append(rank)
    for ranks in _blocks(rows):
        first = rows[ranks[0]]
        if len(ranks) < first.copies:
            found.missing.append(ranks)
        if any(rows[rank].shape != first.shape for rank in ranks):
            found.shapes.append(ranks)
        elif any(rows[rank].values != first.values for rank in ranks):
            found.apart.append(ranks)
    if shards_differ:
        found.same = [ranks for ranks in by_values.values() if len({rows[rank].block for rank in ranks}) > 1]
    return found


def are_replicas(leaves: dict[Key, Rows], large: list[Key], size: int) -> bool:
    """Whether it is certain that replicas are called sharded: all ranks hold the same leaves, and the large ones, none
    of them constant, are equal.

    Args:
        large: the keys of this rank's leaves that are large.
        size: the number of ranks.
    """
    if not large or any(len(rows) < size or len({row.shape for row in rows.values()}) > 1 for rows in leaves.values()):
        return False
    return all(
        row.comparable and row.copies < size and row.values == leaves[key][0].values
        for key in large
        for row in leaves[key].values()
    )


def _blocks(rows: Rows) -> Iterable[list[int]]:
    """The ranks that hold copies of each block."""
    blocks: dict[int, list[int]] = defaultdict(list)
    for rank, row in rows.items():
        blocks[row.block].append(rank)
    return blocks.values()


def are_near(rows: Rows, ranks: list[int]) -> bool:
    """Whether copies differ by a small share of their norm."""
    return all(_distance(rows[ranks[0]], rows[rank]) <= DRIFT for rank in ranks[1:])


def _distance(one: Row, other: Row) -> float:
    """An estimate of the distance of two copies, as a share of their norm; infinite where it cannot be known."""
    if one.values == other.values:
        return 0.0
    norm = max(from_bits(one.norm), from_bits(other.norm))
    pairs = zip(one.sketches, other.sketches, strict=True)
    square = sum((from_bits(a) - from_bits(b)) ** 2 for a, b in pairs) / len(one.sketches)
    return 0.0 if square == 0 else math.sqrt(square) / norm if math.isfinite(square) and norm > 0 else math.inf


# ------------------------------------------------------------------------------------------------- along which axes


def axes_of(group: mx.distributed.Group, names: Iterable[str]) -> Axes:
    """The axes of a mesh that lays out the group: of the mesh that has the named axes, else of the last that was made.
    Without a mesh one axis without a name."""
    meshes = [(mesh, over) for mesh in MESHES if (over := mesh.axes_of(group))]
    meshes = [(mesh, over) for mesh, over in meshes if set(names) <= set(over)] or meshes
    if not meshes:
        return {"": list(range(group.size()))}
    mesh, over = meshes[-1]
    places: Axes = {}
    stride = 1
    for axis in reversed(over):
        if mesh.axes[axis] > 1:
            places[axis] = [rank // stride % mesh.axes[axis] for rank in range(group.size())]
        stride *= mesh.axes[axis]
    return {axis: places[axis] for axis in over if axis in places}


def _lines(ranks: Iterable[int], axis: str, axes: Axes) -> Iterator[list[int]]:
    """The ranks of each line along an axis, of those that are given."""
    lines: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in ranks:
        lines[tuple(places[rank] for name, places in axes.items() if name != axis)].append(rank)
    return (line for line in lines.values() if len(line) > 1)


def _differing(rows: Rows, ranks: Iterable[int], axes: Axes) -> list[str]:
    """The axes along which values differ."""
    ranks = list(ranks)
    return [
        axis
        for axis in axes
        if any(rows[a].values != rows[b].values for line in _lines(ranks, axis, axes) for a, b in pairwise(line))
    ]


class Evidence:
    """What the copies of all leaves say about each axis. Ranks whose copies agree took the same batch, or averaged."""

    def __init__(self, leaves: dict[Key, Rows], axes: Axes) -> None:
        self._agree: Counter[str] = Counter()
        self._differ: Counter[str] = Counter()
        for rows in leaves.values():
            for axis in axes:
                lines = [line for ranks in _blocks(rows) for line in _lines(ranks, axis, axes)]
                if lines and all(row.comparable for row in rows.values()):
                    near = all(are_near(rows, line) for line in lines)
                    (self._agree if near else self._differ)[axis] += 1

    def same_batch(self, axis: str) -> bool:
        return self._agree[axis] > 0

    def other_batches(self, axis: str) -> bool:
        """Whether copies differ in every leaf, of several."""
        return self._agree[axis] == 0 and self._differ[axis] > 1


# ------------------------------------------------------------------------------------------------- in words


def describe_leaf(found: Found, rows: Rows, facts: dict[int, Any], axes: Axes, evidence: Evidence) -> WrongLeaf:
    """A record of a leaf in which something contradicts the layout.

    Args:
        facts: by rank the leaf's path, its dtype and shape, its placement, and the block that each rank should hold.
    """
    path, _, called, block_of = facts[min(facts)]
    if found.placements:
        called = ", ".join(f"{facts[rank][2]} on rank {rank}" for rank in rows)
        return WrongLeaf(path, called, "a leaf has one placement", "give every rank the same layout")
    seen = [_missing(ranks, block_of) for ranks in found.missing]
    for ranks in found.shapes:
        shapes = ", ".join(f"{facts[rank][1]} on rank {rank}" for rank in ranks)
        seen.append(f"its copies have different shapes or types: {shapes}")
    seen += [f"its copies differ on {in_words(ranks)} ({_versions(rows, ranks)})" for ranks in found.apart]
    seen += [f"{in_words(ranks)} hold the same values" for ranks in found.same]
    return WrongLeaf(path, called, " and ".join(seen), _advice(found, rows, len(block_of), axes, evidence))


def _missing(ranks: list[int], block_of: list[int]) -> str:
    absent = [rank for rank, other in enumerate(block_of) if other == block_of[ranks[0]] and rank not in ranks]
    return f"it is missing on {in_words(absent)}, while {in_words(ranks)} hold{'s' * (len(ranks) == 1)} a copy"


def _versions(rows: Rows, ranks: list[int]) -> str:
    versions: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in ranks:
        versions[rows[rank].values].append(rank)
    most_first = sorted(versions.values(), key=lambda held: -len(held))
    return ", ".join(f"{in_words(held)} with norm {from_bits(rows[held[0]].norm):.9g}" for held in most_first)


def _advice(found: Found, rows: Rows, size: int, axes: Axes, evidence: Evidence) -> str:
    if found.shapes:
        return "call it Sharded(...) if they are blocks; else give every rank the same parameter"
    if len(rows) < size and (found.missing or found.same):
        return _advice_for_holders(found, rows)
    if found.missing:
        return "give every rank of its block a copy"
    if found.apart and all(are_near(rows, ranks) for ranks in found.apart):
        return f"the copies drifted apart, by less than {DRIFT:g} of their norm: give the ranks equal parameters again"
    varies = _differing(rows, rows, axes)
    if found.apart:
        whole = len({row.block for row in rows.values()}) == 1
        over = sorted({a for ranks in found.apart for a in _differing(rows, ranks, axes)}, key=list(axes).index)
        return _advice_for_apart(over, _placement("Sharded", varies), whole, evidence)
    if varies != list(axes):
        return f"call it {_placement('Sharded', varies) if varies else 'Replicated()'}"
    return "name the axes that shard it"


def _advice_for_holders(found: Found, rows: Rows) -> str:
    """For a leaf that only some ranks hold."""
    if found.apart or len(rows) == 1:
        return "call it Sharded() if no other rank holds this block"
    return (
        f"call it Replicated(ranks={tuple(rows)}) if these ranks alone hold it, as weights that pipeline stages share"
    )


def _advice_for_apart(over: list[str], sharded: str, whole: bool, evidence: Evidence) -> str:
    """For copies that differ along axes: are they contributions, partial over batches, or blocks?"""
    texts = []
    for axis in over:
        ranks, over_axis = (f"the ranks along {axis}", f" over {axis}") if axis else ("the ranks", "")
        total = f"sum it{over_axis} (call it {_placement('Partial', [axis])})"
        mean = f"average the gradients{over_axis}"
        if not whole:
            texts.append(f"{mean} if {ranks} take different batches")
        elif evidence.same_batch(axis):
            texts.append(f"{ranks} agree on other leaves, so do not average: {total} if each has a contribution")
        elif evidence.other_batches(axis):
            texts.append(f"{ranks} agree on no leaf: {mean} if they take different batches, else {total}")
        else:
            texts.append(f"{total} if {ranks} take the same batch, {mean} if they take different ones")
    return "; ".join([*texts, f"call it {sharded} if they are blocks"])


def _placement(kind: str, axes: list[str]) -> str:
    return f"{kind}({', '.join(repr(axis) for axis in axes if axis)})"
