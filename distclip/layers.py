"""The layout of a model, read from its layers."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from distclip.layout import LayoutError, Placement, Replicated, Sharded
from distclip.mesh import Mesh
from distclip.world import init


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
    parameters: Any = tree_flatten(model.parameters())
    for path, _ in parameters:
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
