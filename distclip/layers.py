"""The layout of a model, read from its layers and from the shapes that its parameters had."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from distclip.arguments import check_model
from distclip.layout import LayoutError, Placement, Replicated, Sharded
from distclip.mesh import Mesh
from distclip.world import init

Shapes = dict[str, tuple[int, ...]]  # of parameters, by path
WRAPPERS = ("module", "linear")  # names below which a layer that is wrapped keeps its parameters


def shapes_of(model: nn.Module) -> Shapes:
    """The shape of each parameter by its path, for :func:`layout_of`: call it before the model is sharded."""
    check_model(model)
    parameters: Any = tree_flatten(model.parameters())
    return {path: leaf.shape for path, leaf in parameters}


def layout_of(model: nn.Module, mesh: Mesh | None = None, *, whole: Shapes | None = None) -> Any:
    """The layout of a model's parameters, read from its layers and, if they are given, from the shapes that they had.

    ``AllToShardedLinear`` and its quantized form are sharded over the layer's group; so is ``ShardedToAllLinear``
    except for its bias, which is a replica; everything inside a ``FullyShardedModule`` is sharded over that module's
    group as well. With ``whole``, a parameter whose shape has changed is a shard too, whatever has cut it
    (``nn.layers.distributed.shard_inplace``, a slice). Everything else is replicated.

    No shape tells of which parameters each rank has a contribution to the gradient only: name them in the result,
    ``Partial("tp")``, or let :func:`distclip.integrations.mlx_lm.shard` measure it.

    Args:
        model (mlx.nn.Module): the model, already sharded.
        mesh (Mesh, optional): the mesh whose groups the layers were given; without it they span the world.
        whole (dict, optional): of :func:`shapes_of`, from before the model was sharded. Wrappers that were put around
            layers since then (``FullyShardedModule``, LoRA) are seen through. Which axis has cut a parameter is told by
            the size: the axes of the tensor parallel layers first, then the axis ``"tp"``, then any.

    Returns:
        A tree like ``model.parameters()`` with a placement for each leaf.

    Raises:
        LayoutError: a layer's group is neither the world nor one of the mesh's groups; or a shape has changed in a way
            that no axis of the mesh explains, or more than one.
    """
    check_model(model)
    over: dict[str, set[str | None]] = {}  # path -> axes; None stands for the whole world
    dims: dict[str, set[int]] = {}  # path -> dimensions that are cut
    likely: set[str | None] = set()  # axes of tensor parallel layers
    parameters: Any = tree_flatten(model.parameters())
    for path, _ in parameters:
        over[path], dims[path] = set(), set()
    for name, module in model.named_modules():
        shards = _shards_of(module)
        if shards is None:
            continue
        group, local, dim = shards
        axes = _axes_of(group, mesh, name, module)
        if not isinstance(module, nn.FullyShardedModule):
            likely |= axes
        for path in over:
            inside = path == name or path.startswith(f"{name}.") or not name
            if inside and local(path[len(name) :].lstrip(".")):
                over[path] |= axes
                dims[path].add(dim)
    if whole is not None:
        _add_cuts(dict(parameters), whole, over, dims, likely or {"tp"}, mesh)
    kinds = {path: (frozenset(over[path]), frozenset(dims[path])) for path in over}
    placed = {kind: _as_placement(set(kind[0]), kind[1], mesh) for kind in set(kinds.values())}
    return tree_unflatten([(path, placed[kind]) for path, kind in kinds.items()])


def _add_cuts(
    parameters: dict[str, mx.array],
    whole: Shapes,
    over: dict[str, set[str | None]],
    dims: dict[str, set[int]],
    likely: set[str | None],
    mesh: Mesh | None,
) -> None:
    """Add to axes and dimensions of each parameter those that its shape shows."""
    for path, leaf in parameters.items():
        before = next((whole[name] for name in _names_before(path) if name in whole), None)
        if before is None:  # it was added since
            continue
        if len(before) != leaf.ndim or any(b % max(n, 1) for b, n in zip(before, leaf.shape, strict=True)):
            raise LayoutError(
                f"Parameter '{path}' had the shape {before} and has {leaf.shape}, which is no equal shard of it. Write "
                "its placement by hand, and shard it so that the ranks divide it."
            )
        cut = [dim for dim, (b, n) in enumerate(zip(before, leaf.shape, strict=True)) if b != n]
        ranks = math.prod(before) // max(leaf.size, 1) if leaf.size else 1
        known = math.prod(_size(axis, mesh) for axis in over[path])
        if known > 1 and ranks == 1:
            raise LayoutError(
                f"Parameter '{path}' is sharded by its layer, and has the shape {before} in `whole` too: call "
                "shapes_of(model) before the model is sharded."
            )
        if ranks != known:
            over[path] |= _axes_that_cut(path, ranks, known, over[path], likely, mesh)
        dims[path] |= set(cut)


def _names_before(path: str) -> list[str]:
    """The paths that a parameter may have had before layers were wrapped."""
    parts = path.split(".")
    without = (WRAPPERS[:1], WRAPPERS[1:], WRAPPERS)
    return [path, *(".".join(part for part in parts if part not in wrappers) for wrappers in without)]


def _axes_that_cut(
    path: str, ranks: int, known: int, over: set[str | None], likely: set[str | None], mesh: Mesh | None
) -> set[str | None]:
    """The axes over which a parameter is cut into ``ranks`` shards, beside those that are known."""
    sizes: dict[str | None, int] = {None: init().size}
    if mesh is not None:
        sizes = {axis: n for axis, n in mesh.axes.items() if n > 1}
    free = [axis for axis in sizes if axis not in over]
    sets = [set(axes) for n in range(1, len(free) + 1) for axes in combinations(free, n)]
    fitting = [axes for axes in sets if math.prod(sizes[axis] for axis in axes) * known == ranks]
    for wanted in (likely, {"tp"}, set(free)):
        among = [axes for axes in fitting if axes <= wanted]
        if len(among) == 1:
            return among[0]
    where = "the world" if mesh is None else repr(mesh)
    raise LayoutError(
        f"Parameter '{path}' is cut into {ranks} shards, which {'no axis' if not fitting else 'more than one axis'} of "
        f"{where} explains. Write its placement by hand, such as Sharded('tp')."
    )


def _size(axis: str | None, mesh: Mesh | None) -> int:
    return init().size if axis is None or mesh is None else mesh.axes[axis]


def _shards_of(module: nn.Module) -> tuple[mx.distributed.Group, Callable[[str], bool], int] | None:
    """The group that shards a module, which of its parameters (by path below it), and which of their dimensions is cut;
    None if it shards nothing."""
    if isinstance(module, nn.AllToShardedLinear | nn.QuantizedAllToShardedLinear):
        return module.group, lambda path: True, 0
    if isinstance(module, nn.ShardedToAllLinear | nn.QuantizedShardedToAllLinear):
        return module.group, lambda path: path != "bias", 1
    if hasattr(module, "sharded_parameter"):  # a layer of distclip.integrations.lora
        return module.group, lambda path: path == module.sharded_parameter, module.sharded_dim
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
