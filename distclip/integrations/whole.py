"""Where the shards of a model of mlx-lm are in its whole parameters, and whole parameters made from shards."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from distclip.layers import Shapes
from distclip.layout import LayoutError, Placement, Sharded
from distclip.mesh import Mesh
from distclip.world import all_gather, group_of_one

AXIS, DATA_AXIS = "tp", "dp"
EXACT = 1 << 24  # whole numbers that a float32 holds


@dataclass
class Sharding:
    """How a model was sharded. It follows the model when its layers are given LoRA.

    Attributes:
        mesh: with an axis ``"tp"``.
        layout: tree of placements, as :func:`distclip.integrations.mlx_lm.shard` returns it.
        positions: of this rank's shards along the dimension that is cut, in the whole parameter, by path.
        divided: paths of parameters that ``model.shard`` has divided by the number of ranks.
    """

    mesh: Mesh
    layout: Any
    positions: dict[str, list[int]]
    divided: set[str]

    @property
    def data_group(self) -> mx.distributed.Group:
        """The ranks that hold what this rank holds, and take other batches."""
        return self.mesh.group(DATA_AXIS) if DATA_AXIS in self.mesh.axes else group_of_one()

    def is_cut(self, placement: Placement) -> bool:
        """Whether ranks along ``"tp"`` hold different shards.

        Raises:
            LayoutError: others do, too, or more than one dimension is cut.
        """
        if not isinstance(placement, Sharded):
            return False
        axes = [axis for axis in placement.axes if self.mesh.size(axis) > 1]
        if axes and (axes != [AXIS] or placement.dim is None):
            raise LayoutError(f"{placement} is not cut along one dimension and the axis {AXIS!r} alone.")
        return bool(axes)

    def rename(self, old: str, new: str) -> None:
        """Give all paths that begin so another beginning."""
        paths = {path: new + path[len(old) :] for path in (*self.positions, *self.divided) if path.startswith(old)}
        self.positions = {paths.get(path, path): numbers for path, numbers in self.positions.items()}
        self.divided = {paths.get(path, path) for path in self.divided}

    def whole(self, weights: dict[str, mx.array], *, keep: bool = True) -> dict[str, mx.array]:
        """Parameters as they are in the model that is not sharded, by path. Collective over the axis ``"tp"``.

        Args:
            weights: parameters of the model, by path.
            keep: whether this rank wants them; else it sends its shards, and gets nothing.

        Raises:
            LayoutError: a parameter is cut in a way that cannot be undone.
        """
        placements: Any = flat(self.layout)
        group, result = self.mesh.group(AXIS), {}
        for path, leaf in weights.items():
            placement = placements[path]
            if self.is_cut(placement):
                leaf = self._joined(path, leaf, placement.dim, group)
            elif path in self.divided:
                leaf = leaf * group.size()
            mx.eval(leaf)
            if keep:
                result[path] = leaf
        return result

    def _joined(self, path: str, leaf: mx.array, dim: int, group: mx.distributed.Group) -> mx.array:
        if path not in self.positions:
            raise LayoutError(f"The shards of '{path}' cannot be put together: they are no part of the parameter.")
        shards = all_gather(leaf[None], group)
        positions: Any = all_gather(mx.array(self.positions[path], mx.int32), group).tolist()
        _, order = np.unique(positions, return_index=True)  # shards may repeat what others hold
        joined = mx.concatenate([shards[i] for i in range(group.size())], axis=dim)
        return mx.take(joined, mx.array(order), axis=dim)


def flat(layout: Any) -> dict[str, Placement]:
    placements: Any = tree_flatten(layout, is_leaf=lambda node: isinstance(node, Placement))
    return dict(placements)


def sharding_of(model: nn.Module) -> Sharding | None:
    """How ``shard`` has sharded a model; None if it has not."""
    return vars(model).get("_sharding")


def remember(model: nn.Module, sharding: Sharding) -> None:
    object.__setattr__(model, "_sharding", sharding)  # a Module would take its arrays for parameters


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model without values in its parameters."""
    parameters = model.parameters()
    model.update(tree_map(lambda _: mx.array(0), parameters))
    try:
        return copy.deepcopy(model)
    finally:
        model.update(parameters)


def positions_of(
    twin: Any, model: nn.Module, whole: Shapes, group: mx.distributed.Group
) -> tuple[dict[str, list[int]], set[str]]:
    """The positions of this rank's shards, and what is divided, as :class:`Sharding` has them.

    The model's twin is sharded with parameters that hold their own positions.

    Args:
        twin: of the model before it was sharded.
        model: after that.
        whole: the shapes of before.
    """
    parameters: Any = tree_flatten(model.parameters())
    dims = {path: _cut(whole[path], leaf.shape) for path, leaf in parameters if path in whole}
    twin.update(tree_unflatten([(path, _numbered(shape, dims.get(path))) for path, shape in whole.items()]))
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    twin.shard(group)
    mx.random.seed(high << 32 | low)  # new layers draw numbers
    after: Any = dict(tree_flatten(twin.parameters()))
    positions, divided = {}, set()
    for path, dim in dims.items():
        if dim is not None:
            leaf = after[path]
            line = leaf[tuple(slice(None) if i == dim else 0 for i in range(leaf.ndim))]
            numbers: Any = line.tolist()
            if whole[path][dim] <= EXACT and all(number == int(number) for number in numbers):
                positions[path] = [int(number) for number in numbers]
        elif after[path].size and math.isclose(after[path][(0,) * after[path].ndim].item() * group.size(), 1.0):
            divided.add(path)
    return positions, divided if group.size() > 1 else set()


def _cut(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The dimension whose size has changed; None if there is none, or more than one."""
    changed = [dim for dim, (b, n) in enumerate(zip(before, after, strict=True)) if b != n]
    return changed[0] if len(changed) == 1 else None


def _numbered(shape: tuple[int, ...], dim: int | None) -> mx.array:
    """The positions along a dimension; ones without one. Takes no memory until it is evaluated."""
    if dim is None:
        return mx.broadcast_to(mx.array(1.0), shape)
    numbers = mx.arange(shape[dim], dtype=mx.float32)
    return mx.broadcast_to(numbers.reshape([-1 if i == dim else 1 for i in range(len(shape))]), shape)
