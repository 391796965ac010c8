"""Which leaves are sharded over which mesh axes: how it is said, how it is read, how it is found in a model."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from distclip.mesh import MESHES, Mesh
from distclip.tree import arrays, flatten, tree_leaves
from distclip.world import init


class LayoutError(ValueError):
    """The gradients, or the trees of different ranks, contradict the layout. The message names leaves and ranks."""


@dataclass(frozen=True, init=False)
class Sharded:
    """A leaf whose ranks hold different pieces: over the whole group, or over mesh axes and replicated over the rest.

    Args:
        *axes (str): mesh axes the leaf is sharded over; none means every rank of the group holds another piece.
        mesh (Mesh, optional): the mesh that has these axes. Needed only when several meshes of a program give one
            axis name different sizes.
        dim (int, optional): the dimension of the array that is cut. Only :func:`distclip.adaptive_clip_grad` asks.
    """

    axes: tuple[str, ...]
    mesh: Mesh | None
    dim: int | None = field(compare=False)

    def __init__(self, *axes: str, mesh: Mesh | None = None, dim: int | None = None):
        for axis in axes:
            if not isinstance(axis, str):
                raise TypeError(f"Sharded takes names of mesh axes, such as Sharded('tp'), not {axis!r}.")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(self, "dim", dim)

    def __repr__(self) -> str:
        return f"Sharded({', '.join(map(repr, self.axes))})"


@dataclass(frozen=True)
class Replicated:
    """A leaf that is the same on every rank of the group."""


Placement = Sharded | Replicated
Layout = Any  # a Placement, a tree prefix of placements, or a callable (path, array) -> Placement


# ------------------------------------------------------------------------------------- reading a layout


def placements(grads: Any, layout: Layout, count: int | None = None) -> list[Placement]:
    """The placement of every leaf, in the order of :func:`flatten`; ``count`` is how many there are, if known.

    Raises:
        LayoutError: the layout says nothing of a leaf.
        TypeError: it says something that is no placement.
    """
    if isinstance(layout, Placement):
        return [layout] * (len(arrays(grads)) if count is None else count)
    if isinstance(layout, type):
        raise TypeError(f"The layout is the class {layout.__name__}; pass an instance, {layout.__name__}().")
    if callable(layout):
        return [_placement(layout(path, leaf), path) for path, leaf in flatten(grads)]
    return [_placement(found, path) for path, found in _below_prefix(grads, layout, "")]


def _below_prefix(grads: Any, layout: Any, path: str) -> Iterable[tuple[str, Any]]:
    children: Iterable[tuple[Any, Any]]
    if grads is None:
        return
    if isinstance(layout, Placement) or isinstance(grads, mx.array):
        for below, leaf in tree_leaves(grads):
            if leaf is not None:
                yield f"{path}.{below}".strip("."), layout
        return
    children = grads.items() if isinstance(grads, dict) else enumerate(grads)
    for key, child in children:
        here = f"{path}.{key}".strip(".")
        try:
            part = layout[key]
        except (KeyError, IndexError, TypeError):
            if not flatten(child):
                continue
            raise LayoutError(
                f"The layout says nothing of '{here}'. Give it a placement (Sharded(...) or Replicated()), or pass "
                "one placement, a callable, or layout_of(model, mesh) as the layout."
            ) from None
        yield from _below_prefix(child, part, here)


def _placement(found: Any, path: str) -> Placement:
    if isinstance(found, Placement):
        return found
    raise TypeError(f"The layout of leaf '{path}' is {found!r}; it must be Sharded(...) or Replicated().")


def mesh_of(placement: Sharded, group: mx.distributed.Group | None = None) -> Mesh:
    """The mesh whose axes a placement names, of those that made the group if one is given.

    Raises:
        LayoutError: no mesh has them, or several meshes have them and lay the ranks out differently.
    """
    if placement.mesh is not None:
        placement.mesh.ordered(placement.axes)
        return placement.mesh
    found = [mesh for mesh in MESHES if set(placement.axes) <= set(mesh.axes)]
    if not found:
        raise LayoutError(
            f"{placement} names mesh axes, but no mesh of this program has them. Make the mesh first, such as "
            f"Mesh(dp=2, {placement.axes[0]}=2), or use Sharded() for the whole group."
        )
    if group is not None:
        found = [mesh for mesh in found if mesh.axes_of(group) is not None] or found
    if len(found) > 1 and len({_places(mesh, placement.axes) for mesh in found}) > 1:
        raise LayoutError(
            f"{placement} could mean any of {', '.join(map(repr, found))}: say which with Sharded(..., mesh=mesh)."
        )
    return found[-1]


def _places(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(mesh.coordinates(rank)[axis] for rank in range(init().size) for axis in axes)


def pieces(placement: Placement, group: mx.distributed.Group) -> list[int]:
    """For every rank of the group, the number of the piece it holds; ranks with one number hold copies of it."""
    ranks = range(group.size())
    if isinstance(placement, Replicated):
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
        rest, piece, stride = rank, 0, 1
        for axis in reversed(over):
            rest, place = divmod(rest, mesh.axes[axis])
            if axis in placement.axes:
                piece += place * stride
                stride *= mesh.axes[axis]
        numbers.append(piece)
    return numbers


def copies(placement: Placement, group: mx.distributed.Group) -> int:
    """How many ranks of the group hold the same piece."""
    return group.size() // len(set(pieces(placement, group)))


def communicates(layout: Layout, placed: list[Placement]) -> bool:
    """Whether a norm over this layout takes a collective: it does unless everything is replicated.

    A tree decides by all that it says, which is the same on every rank when the leaves are not. A callable can only
    be asked about this rank's leaves; a rank that has none takes part.
    """
    if isinstance(layout, Placement):
        return isinstance(layout, Sharded)
    if not callable(layout):
        placed = [placement for _, placement in tree_leaves(layout)]
    return not placed or any(isinstance(placement, Sharded) for placement in placed)


# --------------------------------------------------------------------------------- the layout of a model


def layout_of(model: nn.Module, mesh: Mesh | None = None) -> Any:
    """The layout of a model's parameters, read from its layers.

    ``AllToShardedLinear`` and its quantized form are sharded over the layer's group; so is ``ShardedToAllLinear``
    except for its bias, which is a replica; everything inside a ``FullyShardedModule`` is sharded over that module's
    group as well; everything else is replicated. Parameters split by hand (``nn.layers.distributed.shard_inplace``
    on another layer) cannot be seen: correct their entries in the result.

    Args:
        model (mlx.nn.Module): the model, already sharded.
        mesh (Mesh, optional): the mesh whose groups the layers were given; without it they span the world.

    Returns:
        A tree like ``model.parameters()`` with a placement for each leaf.

    Raises:
        LayoutError: a layer's group is neither the world nor one of the mesh's groups.
    """
    over: dict[str, set[str | None]] = {}  # path -> axes; None stands for the whole world
    dims: dict[str, set[int]] = {}  # path -> dimensions that are cut
    for path, _ in tree_leaves(model.parameters()):
        over[path], dims[path] = set(), set()
    for name, module in model.named_modules():
        shards = _shards_of(module)
        if shards is None:
            continue
        group, local, dim = shards
        axes = _axes_of(group, mesh, name, module)
        for path in over:
            inside = path == name or path.startswith(f"{name}.") or not name
            if inside and local(path[len(name) :].lstrip(".")):
                over[path] |= axes
                dims[path].add(dim)
    kinds = {path: (frozenset(over[path]), frozenset(dims[path])) for path in over}
    placed = {kind: _as_placement(set(kind[0]), kind[1], mesh) for kind in set(kinds.values())}
    return tree_unflatten([(path, placed[kind]) for path, kind in kinds.items()])


def _shards_of(module: nn.Module) -> tuple[mx.distributed.Group, Callable[[str], bool], int] | None:
    """The group that shards a module, which of its parameters (by path below it), and which of their dimensions is cut;
    None if it shards nothing."""
    if isinstance(module, nn.AllToShardedLinear | nn.QuantizedAllToShardedLinear):
        return module.group, lambda path: True, 0
    if isinstance(module, nn.ShardedToAllLinear | nn.QuantizedShardedToAllLinear):
        return module.group, lambda path: path != "bias", 1
    if isinstance(module, nn.FullyShardedModule):
        # It names the parameters that it shards itself; a FullyShardedModule inside it has its own group.
        own = {f"module.{path}" for path in module._paths}
        return _group_of_fully_sharded(module), lambda path: path in own, 0
    return None


def _group_of_fully_sharded(module: nn.Module) -> mx.distributed.Group:
    # MLX keeps the group in the closure of the gather function alone.
    for function in gc.get_referents(module._gather_fn):
        if inspect.isfunction(function):
            group = inspect.getclosurevars(function).nonlocals.get("group")
            if isinstance(group, mx.distributed.Group):
                return group
    raise LayoutError(
        "The group of a FullyShardedModule could not be read. Write its placement by hand, such as Sharded('fsdp')."
    )


def _axes_of(group: mx.distributed.Group, mesh: Mesh | None, name: str, module: nn.Module) -> set[str | None]:
    axes = mesh.axes_of(group) if mesh is not None else None
    if axes is not None:
        return set(axes)
    if group.size() == init().size:
        return {None} if mesh is None else set(mesh.axes)
    raise LayoutError(
        f"Layer '{name}' ({type(module).__name__}) is sharded over a group of {group.size()} ranks that is neither "
        f"the world nor one of a mesh's. Make the layer with group=mesh.group(...) and pass that mesh to layout_of."
    )


def _as_placement(axes: set[str | None], dims: frozenset[int], mesh: Mesh | None) -> Placement:
    dim = next(iter(dims)) if len(dims) == 1 else None
    if None in axes:
        return Sharded(dim=dim)
    named = [axis for axis in axes if axis is not None]
    return Sharded(*mesh.ordered(tuple(named)), mesh=mesh, dim=dim) if mesh is not None and named else Replicated()
