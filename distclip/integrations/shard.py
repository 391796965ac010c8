"""Shard a model of mlx-lm over a mesh axis, and say where its parameters are: by shapes, and by measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from distclip.integrations.lora import offer_lora, put_lora_back, take_lora_off
from distclip.integrations.whole import AXIS, Sharding, flat, positions_of, remember, twin_of
from distclip.layers import layout_of, shapes_of
from distclip.layout import LayoutError, Partial, Placement, Replicated, Sharded
from distclip.mesh import Mesh
from distclip.slope import check_gradient
from distclip.world import all_sum

ROWS, LENGTH, TOKENS = 2, 24, 32  # of the batch that is measured: tokens that any vocabulary has
NOISE = 0.1, 0.02  # relative, and absolute, that parameters get while gradients are measured
PROBED = (nn.QuantizedLinear, QuantizedSwitchLinear)
LEAST_DIFFERENCE = 1e-3  # of a gradient's norm: copies that differ by less are replicas


def shard(model: Any, mesh: Mesh) -> Any:
    """Call mlx-lm's ``model.shard`` with the mesh's axis ``"tp"``, and return the layout that is right for the result.

    Shards are known by their shapes. Of the other parameters a gradient is measured, on random tokens and at parameters
    that are moved a little, so that none is zero by its start: where it is the same on all ranks the parameter is a
    replica, else each rank has a contribution, ``Partial("tp")``. The parameters are put back to the bit. Then
    :func:`distclip.check_gradient` compares the gradient with the loss. Collective. Call it on the whole model, with
    the same parameters on every rank, before the optimizer is made.

    LoRA may be added before, and is cut as its layers are; or afterwards, by mlx-lm's ``linear_to_lora_layers``: every
    rank calls it, all get the matrices of rank 0, and the layout that was returned follows. What was frozen stays so.

    Args:
        model (mlx.nn.Module): a model of mlx-lm that has ``shard``. Needs memory for a second copy of this rank's
            shards and for their gradient.
        mesh (Mesh): with an axis ``"tp"``.

    Returns:
        A tree like ``model.parameters()`` with a placement for each leaf: the layout for a Clipper.

    Raises:
        TypeError: the model cannot be sharded.
        ValueError: the mesh has no axis ``"tp"``, or its ranks cannot share the model's heads evenly.
        LayoutError: the gradient that mlx-lm computes for the sharded model is wrong; names leaves and factors.
    """
    if not callable(getattr(model, "shard", None)):
        raise TypeError(f"{type(model).__module__} has no shard(): mlx-lm cannot split this model over ranks.")
    if AXIS not in mesh.axes:
        raise ValueError(f"{mesh} has no axis {AXIS!r}: make it with Mesh({AXIS}=...).")
    taken = take_lora_off(model)
    whole, twin, frozen = shapes_of(model), twin_of(model), _frozen(model)
    heads = _heads(model)
    try:
        model.shard(mesh.group(AXIS))
    finally:  # some models divide by what is zero then
        _check_heads(heads, _heads(model), mesh.size(AXIS))
    _freeze(model, frozen)  # layers that were replaced are trained again
    layout = layout_of(model, mesh, whole=whole)
    positions, divided = positions_of(twin, model, whole, mesh.group(AXIS))
    if mesh.size(AXIS) > 1:
        layout = _measured(model, layout, mesh, divided)
    sharding = Sharding(mesh, layout, positions, divided)
    offer_lora(model, sharding)
    put_lora_back(model, taken)
    remember(model, sharding)
    return layout


def _heads(model: nn.Module) -> dict[str, int]:
    """The numbers of heads that the model's modules keep, by path."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "heads" in key and isinstance(value, int)
    }


def _check_heads(before: dict[str, int], after: dict[str, int], ranks: int) -> None:
    for path, number in before.items():
        mine = after.get(path, number)
        if mine not in (number, number / ranks):
            raise ValueError(
                f"{path} is {number}, and {ranks} ranks cannot share {number} heads evenly: each would have {mine}. "
                f"Give the axis {AXIS!r} a number of ranks that divides {number}. The model is cut now: load it again."
            )


def _frozen(model: nn.Module) -> dict[str, set[str]]:
    """What is not trained of each module, by its path."""
    return {name: set(module._no_grad) for name, module in model.named_modules()}


def _freeze(model: nn.Module, frozen: dict[str, set[str]]) -> None:
    for name, module in model.named_modules():
        module._no_grad = module._no_grad | frozen.get(name, set())


def _measured(model: Any, layout: Any, mesh: Mesh, divided: set[str]) -> Any:
    """The layout with the contributions that a gradient shows.

    Raises:
        LayoutError: the gradient is wrong.
    """
    placements = flat(layout)
    with _probed(model, placements) as probes, _moved(model, placements, mesh):
        tokens = mx.random.randint(0, TOKENS, (ROWS, LENGTH + 1), key=mx.random.key(0))
        grads = _gradient(model, tokens)
        _find_contributions(placements, grads, mesh)
        # The loss moves by the parameter of every rank, of which each has its part.
        whole = {path: grad * mesh.size(AXIS) if path in divided else grad for path, grad in grads.items()}
        _check(model, tokens, whole, tree_unflatten(list(placements.items())))
    for name in probes:
        for path in placements:
            if path.startswith(f"{name}."):
                placements[path] = placements[f"{name}.bias"]
    before = flat(layout)
    return tree_unflatten([(path, placements[path]) for path in before])


@contextmanager
def _probed(model: Any, placements: dict[str, Placement]) -> Iterator[list[str]]:
    """Let quantized layers that every rank holds whole, and that have no gradient, show by a bias whether each rank has
    a contribution to them: their LoRA is of that kind.

    Yields:
        list of str: the paths of these layers.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PROBED) and isinstance(placements[f"{name}.weight"], Replicated)
    }
    added = {name: module for name, module in layers.items() if "bias" not in module}
    for name, module in added.items():
        module.bias = mx.zeros(module.scales.shape[:-1], module.scales.dtype)
        placements[f"{name}.bias"] = Replicated()
    try:
        yield list(layers)
    finally:
        for module in added.values():
            del module.bias


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
def _moved(model: Any, placements: dict[str, Placement], mesh: Mesh) -> Iterator[None]:
    """Give parameters some noise, the same where they are replicas, and train all that can be; undo both at the end."""
    parameters: Any = tree_flatten(model.parameters())
    frozen = _frozen(model)
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
        for module in model.modules():
            if "scales" in module:  # quantized weights have no gradient
                module.freeze(recurse=False)
            if isinstance(module, PROBED):
                module._no_grad = module._no_grad - {"bias"}
        yield
    finally:
        model.update(tree_unflatten(parameters))
        for name, module in model.named_modules():
            module._no_grad = frozen[name]


def _find_contributions(placements: dict[str, Placement], grads: dict[str, mx.array], mesh: Mesh) -> None:
    """Place replicas whose gradient differs over the ranks as partial."""
    group = mesh.group(AXIS)
    replicas = [path for path, placement in placements.items() if isinstance(placement, Replicated) and path in grads]
    sizes = []
    for path in replicas:
        mine = grads[path].astype(mx.float32)
        mean = all_sum(mine, group) / group.size()
        sizes.append(mx.stack([mx.square(mine - mean).sum(), mx.square(mine).sum()]))
    if not sizes:
        return
    summed: Any = all_sum(mx.stack(sizes), group).tolist()
    for path, (apart, whole) in zip(replicas, summed, strict=True):
        if apart > LEAST_DIFFERENCE**2 * whole:
            placements[path] = Partial(AXIS, mesh=mesh)


def _check(model: Any, tokens: mx.array, grads: dict[str, mx.array], layout: Any) -> None:
    try:
        check_gradient(model, _loss, tokens, tree_unflatten(list(grads.items())), layout)
    except LayoutError as error:
        raise LayoutError(
            f"{type(model).__module__}: with tensor parallelism the gradient that mlx-lm computes is not that of the "
            f"loss, and no layout mends it. Train this model without it. {error}"
        ) from error
