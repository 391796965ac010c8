"""Layouts: which leaves are sharded over which mesh axes, and how much each counts in a global norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from distclip.arguments import check_gradients, shown
from distclip.mesh import MESHES, Mesh, as_group
from distclip.tree import Keys, Leaves, dotted, memo_by_prefix
from distclip.world import init


@dataclass(frozen=True)
class WrongLeaf:
    """A leaf that contradicts the layout.

    Attributes:
        path: dotted; empty for a single array.
        called: its placement in the layout.
        seen: what it looks like on the ranks.
        advice: what to call it, or what to do.
    """

    path: str
    called: str
    seen: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path or 'the array'}: called {self.called}, but {self.seen}; {self.advice}"


class LayoutError(ValueError):
    """The gradients, or the trees of different ranks, contradict the layout. The message names leaves and ranks.

    Attributes:
        leaves (list of WrongLeaf): from :func:`distclip.check_layout`: every leaf that is wrong, by path. The message
            shows ten.
    """

    def __init__(self, message: str, leaves: Sequence[WrongLeaf] = ()) -> None:
        super().__init__(message)
        self.leaves: list[WrongLeaf] = list(leaves)


@dataclass(frozen=True, init=False)
class Sharded:
    """A leaf whose ranks hold different shards: over the whole group, or over mesh axes and replicated over the rest.

    Args:
        *axes (str): mesh axes the leaf is sharded over; none means every rank of the group holds another shard.
        mesh (Mesh, optional): the mesh that has these axes. Needed only when several meshes of a program give one
            axis name different sizes.
        dim (int, optional): the dimension of the array that is cut. Only :func:`distclip.adaptive_clip_grad` asks.
    """

    axes: tuple[str, ...]
    mesh: Mesh | None
    dim: int | None = field(compare=False)

    def __init__(self, *axes: str, mesh: Mesh | None = None, dim: int | None = None):
        _check_names(axes, "Sharded")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(self, "dim", dim)

    def __repr__(self) -> str:
        return f"Sharded({', '.join(map(repr, self.axes))})"


@dataclass(frozen=True)
class Replicated:
    """A leaf that is the same on every rank of the group, or on some of its ranks, which alone hold it.

    Args:
        ranks (sequence of int, optional): the ranks that hold the leaf, by their numbers in the group, such as the
            first and the last pipeline stage for weights that both use. Default: all.
    """

    ranks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None:
            if not self.ranks:
                raise ValueError("Replicated(ranks=...) takes the numbers of at least one rank.")
            object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))

    def __repr__(self) -> str:
        return "Replicated()" if self.ranks is None else f"Replicated(ranks={self.ranks})"


@dataclass(frozen=True, init=False)
class Partial:
    """A leaf of which each rank along mesh axes has a contribution: the gradient is their sum, a replica there.

    Tensor parallel layers leave such gradients in parameters that every rank holds whole and applies to its own shard
    of the activations: the norm of a head's queries, a router. Each function that takes a layout sums them first, and
    returns the sums.

    Args:
        *axes (str): mesh axes to sum over; none means all ranks of the group.
        mesh (Mesh, optional): the mesh that has these axes, as for :class:`Sharded`.
    """

    axes: tuple[str, ...]
    mesh: Mesh | None

    def __init__(self, *axes: str, mesh: Mesh | None = None):
        _check_names(axes, "Partial")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "mesh", mesh)

    def __repr__(self) -> str:
        return f"Partial({', '.join(map(repr, self.axes))})"


def _check_names(axes: tuple[str, ...], kind: str) -> None:
    for axis in axes:
        if not isinstance(axis, str):
            raise TypeError(f"{kind} takes names of mesh axes, such as {kind}('tp'), not {axis!r}.")


Placement = Sharded | Replicated | Partial
# One for all leaves, a function of a leaf's path and value, or a tree prefix.
Layout = Placement | Callable[[str, mx.array], Placement] | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class Placed:
    """The leaves of a gradient tree on this rank, and where they are.

    Attributes:
        leaves: taken apart once.
        placements: of each leaf.
        group: the ranks that hold the gradient together.
        summed: the numbers of the leaves that are partial over mesh axes, by placement.
        agreed: the ranks that agree on a norm by a collective; None where every leaf is a replica.
        share: what the sum over each leaf counts in that collective, float64, shape (leaves, 1), or () where all count
            alike; None where nothing is added over ranks.
    """

    leaves: Leaves
    placements: list[Placement]
    group: mx.distributed.Group
    summed: dict[Partial, list[int]]
    agreed: mx.distributed.Group | None
    share: mx.array | None


def place(grads: Any, layout: Layout, group: Any, *, named: bool = False) -> Placed:
    """Take a gradient tree apart, and place its leaves.

    Args:
        group: the ranks that hold the gradient together; None for the world.
        named: whether the paths of the leaves will be asked for, whatever the layout.

    Raises:
        LayoutError: a leaf has no placement, or one that names axes that no mesh of the group has.
        TypeError: a leaf is no array, or its placement is none.
    """
    check_gradients(grads)
    group = as_group(group)
    leaves = Leaves(grads, named=named or not isinstance(layout, Placement))
    placed = placements(leaves, layout)
    agreed = agreeing(layout, placed, group)
    distinct = {id(placement): placement for placement in (placed[:1] if isinstance(layout, Placement) else placed)}
    _check_held(leaves, placed, distinct, group.rank())
    # A block that n ranks hold counts 1/n.
    known = {key: 1.0 / copies(placement, group) for key, placement in distinct.items()}
    share: Any = max(known.values(), default=1.0)
    if len(set(known.values())) > 1:
        share = [[known[id(placement)]] for placement in placed]
    share = mx.array(share, mx.float64) if agreed is not None else None
    partial = any(isinstance(placement, Partial) for placement in distinct.values())
    return Placed(leaves, placed, group, _summed(placed, group) if partial else {}, agreed, share)


def _check_held(leaves: Leaves, placed: list[Placement], distinct: dict[int, Placement], rank: int) -> None:
    for placement in distinct.values():
        if isinstance(placement, Replicated) and placement.ranks is not None and rank not in placement.ranks:
            path = leaves.paths[placed.index(placement)]
            raise LayoutError(f"Leaf '{path}' is called {placement}, but rank {rank} holds it too: name all its ranks.")


def _summed(placed: list[Placement], group: mx.distributed.Group) -> dict[Partial, list[int]]:
    """The numbers of the leaves that are partial over axes of more than one rank, in an order of all ranks."""
    numbers: dict[Partial, list[int]] = {}
    for i, placement in enumerate(placed):
        if isinstance(placement, Partial) and group_of(placement, group).size() > 1:
            numbers.setdefault(placement, []).append(i)
    return dict(sorted(numbers.items(), key=lambda item: item[0].axes))


def group_of(placement: Sharded | Partial, group: mx.distributed.Group) -> mx.distributed.Group:
    """The ranks along a placement's axes; without axes all of a group."""
    return mesh_of(placement, group).group(*placement.axes) if placement.axes else group


def placements(leaves: Leaves, layout: Layout) -> list[Placement]:
    """The placement of each leaf.

    Raises:
        LayoutError: the layout gives a leaf no placement.
        TypeError: it gives a leaf something that is no placement.
    """
    if isinstance(layout, Placement):
        return [layout] * len(leaves.arrays)
    if layout is None:
        raise TypeError(WRONG_LAYOUT.format("None"))
    check_kind(layout)
    if callable(layout):
        given = [layout(path, leaf) for path, leaf in zip(leaves.paths, leaves.arrays, strict=True)]
    else:
        follow = memo_by_prefix(_below, layout)
        given = [follow(keys) for keys in leaves.keys]
    for keys, placement in zip(leaves.keys, given, strict=True):
        if placement is _MISSING:
            raise LayoutError(
                f"The layout has no placement for '{_first_missing(layout, keys)}'. Give it one (Sharded(...) or "
                "Replicated()), or pass one placement, a callable, or layout_of(model, mesh) as the layout."
            )
        if not isinstance(placement, Placement):
            raise TypeError(
                f"The layout of leaf '{dotted(keys)}' is {placement!r}; it must be Sharded(...), Replicated() or "
                "Partial(...)."
            )
    return given


WRONG_LAYOUT = "The layout is {}; pass a placement such as Sharded('tp'), or layout_of(model, mesh)."


def check_kind(layout: Any) -> None:
    """Raise TypeError for what cannot be a layout: a class, a text, a model, a mesh. None is no layout yet."""
    if isinstance(layout, type):
        raise TypeError(f"The layout is the class {layout.__name__}; pass an instance, {layout.__name__}().")
    if isinstance(layout, (str, Mesh)) or hasattr(layout, "trainable_parameters"):
        raise TypeError(WRONG_LAYOUT.format(shown(layout)))


_MISSING = object()  # what a tree prefix has for a leaf that it does not name


def _below(node: Any, key: Any) -> Any:
    if isinstance(node, Placement) or node is _MISSING:
        return node
    try:
        return node[key]
    except (KeyError, IndexError, TypeError):
        return _MISSING


def _first_missing(layout: Any, keys: Keys) -> str:
    """The dotted path of the outermost container, or the leaf, that a tree prefix does not name."""
    outer = keys[0]
    return _first_missing(layout, outer) if memo_by_prefix(_below, layout)(outer) is _MISSING else dotted(keys)


def mesh_of(placement: Sharded | Partial, group: mx.distributed.Group | None = None) -> Mesh:
    """The mesh whose axes a placement names, of those that made the group if one is given.

    Raises:
        LayoutError: no mesh has them, or several meshes have them and lay the ranks out differently.
    """
    if placement.mesh is not None:
        placement.mesh.ordered(placement.axes)
        return placement.mesh
    meshes = [mesh for mesh in MESHES if set(placement.axes) <= set(mesh.axes)]
    if not meshes:
        raise LayoutError(
            f"{placement} names mesh axes, but no mesh of this program has them. Make the mesh first, such as "
            f"Mesh(dp=2, {placement.axes[0]}=2), or use Sharded() for the whole group."
        )
    if group is not None:
        meshes = [mesh for mesh in meshes if mesh.axes_of(group) is not None] or meshes
    if len(meshes) > 1 and len({_places(mesh, placement.axes) for mesh in meshes}) > 1:
        raise LayoutError(
            f"{placement} could mean any of {', '.join(map(repr, meshes))}: name it with Sharded(..., mesh=mesh)."
        )
    return meshes[-1]


def _places(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(mesh.coordinates(rank)[axis] for rank in range(init().size) for axis in axes)


def blocks(placement: Placement, group: mx.distributed.Group) -> list[int]:
    """The number of the block that each rank of the group holds, leaves that are partial over mesh axes once they are
    summed; ranks with one number hold copies of it."""
    ranks = range(group.size())
    if isinstance(placement, Replicated) and placement.ranks is not None:
        return [0 if rank in placement.ranks else rank + 1 for rank in ranks]
    if not isinstance(placement, Sharded):
        return [0 for _ in ranks]
    if not placement.axes:
        return list(ranks)
    mesh = mesh_of(placement, group)
    over = mesh.axes_of(group)
    if over is None:
        raise LayoutError(
            f"{placement} names axes of {mesh}, but the group is not one of that mesh's. Pass group=None for the whole "
            "mesh, or a group from mesh.group(...)."
        )
    numbers = []
    for rank in ranks:
        rest, block, stride = rank, 0, 1
        for axis in reversed(over):
            rest, place = divmod(rest, mesh.axes[axis])
            if axis in placement.axes:
                block += place * stride
                stride *= mesh.axes[axis]
        numbers.append(block)
    return numbers


def copies(placement: Placement, group: mx.distributed.Group) -> int:
    """How many ranks of the group hold the same block."""
    if isinstance(placement, Replicated) and placement.ranks is not None:
        return len(placement.ranks)
    return group.size() // len(set(blocks(placement, group)))


def agreeing(layout: Layout, placed: list[Placement], group: mx.distributed.Group) -> mx.distributed.Group | None:
    """The ranks that agree on a norm by a collective: the group, or None where every leaf is a replica.

    A tree decides by all of its placements, which are the same on every rank when the leaves are not. A callable can
    only be asked about this rank's leaves; a rank that has none takes part.
    """
    if group.size() == 1:
        return None
    if isinstance(layout, Placement):
        return group if _differs(layout) else None
    named: list[Any] = placed
    if not callable(layout) and not any(map(_differs, placed)):
        flat: Any = tree_flatten(layout)
        named = [placement for _, placement in flat]
    return group if not named or any(map(_differs, named)) else None


def _differs(placement: Any) -> bool:
    """Whether some ranks hold what others do not."""
    return isinstance(placement, Sharded) or (isinstance(placement, Replicated) and placement.ranks is not None)
