"""Shard a model of mlx-lm over a mesh axis, and say where its parameters are: by shapes, and by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from distclip.layers import layout_of, shapes_of
from distclip.layout import LayoutError, Partial, Placement, Replicated, Sharded
from distclip.mesh import Mesh
from distclip.slope import check_gradient
from distclip.world import all_sum

AXIS = "tp"
ROWS, LENGTH, TOKENS = 2, 24, 32  # of the batch that is measured: tokens that any vocabulary has
SMALL = 1 << 22  # values of a parameter that is kept while the model is sharded
NOISE = 0.1, 0.02  # relative, and absolute, that parameters get while gradients are measured
LEAST_DIFFERENCE = 1e-3  # of a gradient's norm: copies that differ by less are replicas


def shard(model: Any, mesh: Mesh) -> Any:
    """Call mlx-lm's ``model.shard`` with the mesh's axis ``"tp"``, and return the layout that is right for the result.

    Shards are known by their shapes. Of the other parameters a gradient is measured, on random tokens and at parameters
    that are moved a little, so that none is zero by its start: where it is the same on all ranks the parameter is a
    replica, else each rank has a contribution, ``Partial("tp")``. The parameters are put back to the bit. Then
    :func:`distclip.check_gradient` compares the gradient with the loss. Collective. Call it on the whole model, with
    the same parameters on every rank, before the optimizer is made and before LoRA layers are added.

    Args:
        model (mlx.nn.Module): a model of mlx-lm that has ``shard``. Needs memory for a second copy of this rank's
            shards and for their gradient.
        mesh (Mesh): with an axis ``"tp"``.

    Returns:
        A tree like ``model.parameters()`` with a placement for each leaf: the layout for a Clipper.

    Raises:
        TypeError: the model cannot be sharded.
        ValueError: the mesh has no axis ``"tp"``.
        LayoutError: the gradient that mlx-lm computes for the sharded model is wrong; names leaves and factors.
    """
    if not callable(getattr(model, "shard", None)):
        raise TypeError(f"{type(model).__module__} has no shard(): mlx-lm cannot split this model over ranks.")
    if AXIS not in mesh.axes:
        raise ValueError(f"{mesh} has no axis {AXIS!r}: make it with Mesh({AXIS}=...).")
    whole, small = shapes_of(model), _small_leaves(model)
    model.shard(mesh.group(AXIS))
    layout = layout_of(model, mesh, whole=whole)
    if mesh.size(AXIS) == 1:
        return layout
    divided = _divided(small, _small_leaves(model), mesh.size(AXIS))
    with _moved(model, layout, mesh):
        tokens = mx.random.randint(0, TOKENS, (ROWS, LENGTH + 1), key=mx.random.key(0))
        grads = _gradient(model, tokens)
        layout = _with_contributions(layout, grads, mesh)
        # The loss moves by the parameter of every rank, of which each has its part.
        whole_grads = {path: grad * mesh.size(AXIS) if path in divided else grad for path, grad in grads.items()}
        _check(model, tokens, whole_grads, layout)
    return layout


def _small_leaves(model: Any) -> dict[str, mx.array]:
    parameters: Any = tree_flatten(model.parameters())
    return {path: mx.array(leaf) for path, leaf in parameters if leaf.size <= SMALL}  # /= would change the leaf


def _divided(before: dict[str, mx.array], after: dict[str, mx.array], ranks: int) -> set[str]:
    """Parameters that ``model.shard`` has divided by the number of ranks, since the ranks add up what they add."""
    return {
        path
        for path, leaf in after.items()
        if path in before
        and before[path].shape == leaf.shape
        and mx.issubdtype(leaf.dtype, mx.floating)
        and mx.any(leaf).item()
        and mx.allclose(leaf.astype(mx.float32) * ranks, before[path].astype(mx.float32)).item()
    }


def _loss(model: Any, tokens: mx.array) -> Any:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def _gradient(model: Any, tokens: mx.array) -> dict[str, mx.array]:
    """Of the parameters that have one, by path: those of quantized layers have none."""
    _, grads = nn.value_and_grad(model, _loss)(model, tokens)
    mx.eval(grads)
    flat: Any = tree_flatten(grads)
    return dict(flat)


@contextmanager
def _moved(model: Any, layout: Any, mesh: Mesh) -> Iterator[None]:
    """Give parameters some noise, the same where they are replicas, and train all that can be; undo both at the end."""
    parameters: Any = tree_flatten(model.parameters())
    frozen = {name: set(module._no_grad) for name, module in model.named_modules()}
    placements: Any = dict(tree_flatten(layout, is_leaf=lambda node: isinstance(node, Placement)))
    place = mesh.coordinates()[AXIS]
    relative, absolute = NOISE
    moved = []
    for path, leaf in parameters:
        if not mx.issubdtype(leaf.dtype, mx.floating):
            continue
        seed = crc32(f"{path} {place if isinstance(placements[path], Sharded) else ''}".encode())
        noise = mx.random.normal((2, *leaf.shape), key=mx.random.key(seed))
        moved.append((path, (leaf * (1 + relative * noise[0]) + absolute * noise[1]).astype(leaf.dtype)))
    try:
        model.update(tree_unflatten(moved))
        model.unfreeze()
        yield
    finally:
        model.update(tree_unflatten(parameters))
        for name, module in model.named_modules():
            module._no_grad = frozen[name]


def _with_contributions(layout: Any, grads: dict[str, mx.array], mesh: Mesh) -> Any:
    """The layout, replicas whose gradient differs over the ranks being partial."""
    group = mesh.group(AXIS)
    flat: Any = tree_flatten(layout, is_leaf=lambda node: isinstance(node, Placement))
    placements = dict(flat)
    replicas = [path for path, placement in flat if isinstance(placement, Replicated) and path in grads]
    sizes = []
    for path in replicas:
        mine = grads[path].astype(mx.float32)
        mean = all_sum(mine, group) / group.size()
        sizes.append(mx.stack([mx.square(mine - mean).sum(), mx.square(mine).sum()]))
    if not sizes:
        return layout
    summed: Any = all_sum(mx.stack(sizes), group).tolist()
    for path, (apart, whole) in zip(replicas, summed, strict=True):
        if apart > LEAST_DIFFERENCE**2 * whole:
            placements[path] = Partial(AXIS, mesh=mesh)
    return tree_unflatten(list(placements.items()))


def _check(model: Any, tokens: mx.array, grads: dict[str, mx.array], layout: Any) -> None:
    try:
        check_gradient(model, _loss, tokens, tree_unflatten(list(grads.items())), layout)
    except LayoutError as error:
        raise LayoutError(
            f"{type(model).__module__}: with tensor parallelism the gradient that mlx-lm computes is not that of the "
            f"loss, and no layout mends it. Train this model without it. {error}"
        ) from error
