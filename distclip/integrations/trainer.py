"""Names of mlx-lm's trainer, replaced for a while, so that it waits for other ranks on the host and knows of a mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer

from distclip.check import contradiction
from distclip.integrations.shard import shard
from distclip.integrations.whole import AXIS, DATA_AXIS, Sharding, sharding_of
from distclip.layout import place
from distclip.mesh import Mesh
from distclip.schedule import is_apart
from distclip.tree import flatten_beside
from distclip.world import all_gather, all_sum, init


def sharding_over(model: Any, mesh: Mesh) -> Sharding:
    """How a model is sharded over a mesh; it is sharded now if it was not. Collective.

    Raises:
        ValueError: the model was sharded over another mesh, or the mesh has other axes than dp and tp.
    """
    others = [axis for axis in _axes(mesh) if axis not in (AXIS, DATA_AXIS)]
    if others:
        raise ValueError(f"mlx-lm's trainer works over the axes {DATA_AXIS!r} and {AXIS!r}, and {mesh} has {others}.")
    if sharding_of(model) is None:
        shard(model, mesh)
    sharding = sharding_of(model)
    if sharding is None or list(_axes(sharding.mesh).items()) != list(_axes(mesh).items()):
        raise ValueError(f"The model is sharded over another mesh than {mesh}.")
    return sharding


def _axes(mesh: Mesh) -> dict[str, int]:
    return {axis: size for axis, size in mesh.axes.items() if size > 1}


@contextlib.contextmanager
def adapted(sharding: Sharding | None = None) -> Iterator[bool]:
    """Replace names of mlx-lm's trainer until the context ends.

    Where a device would wait for other ranks in its compiled step, that step is taken apart: the trainer then averages
    nothing (the clipper does), and its sums over ranks are on the host when it has them. With a sharded model it
    averages, sums and splits batches over the ranks that take other batches alone, and saves parameters whole.

    Yields:
        bool: whether the step was taken apart.
    """
    world = init()
    apart = is_apart(world.group, None)
    if not apart and sharding is None:
        yield False
        return
    over = sharding.data_group if sharding is not None else None

    def sum_over_data(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
        total = mx.distributed.all_sum(x, group=over if group is None else group, stream=world.stream)
        if apart:
            mx.eval(total)
        return total

    distributed = vars(mx.distributed) | {"all_sum": sum_over_data}
    arrays: dict[str, Any] = dict(vars(mx))
    names: dict[str, Any] = {}
    if sharding is not None:
        distributed["init"] = lambda *_, **__: over
        arrays["save_safetensors"] = partial(_save_whole, sharding)
        names["average_gradients"] = partial(nn.average_gradients, group=over)
        if hasattr(trainer, "TrainUI"):
            shown: Any = trainer.TrainUI
            names["TrainUI"] = lambda iters, rank: shown(iters, rank=world.rank)
    if apart:
        arrays["compile"] = lambda step, **_: step
        names["nn"] = SimpleNamespace(**vars(nn) | {"value_and_grad": _compiled_value_and_grad})
        names["average_gradients"] = lambda gradients: gradients
    names["mx"] = SimpleNamespace(**arrays | {"distributed": SimpleNamespace(**distributed)})
    before = {name: getattr(trainer, name) for name in names}
    vars(trainer).update(names)
    try:
        yield apart
    finally:
        vars(trainer).update(before)


def _compiled_value_and_grad(model: Any, loss: Callable[..., Any]) -> Callable[..., Any]:
    value_and_grad = nn.value_and_grad(model, loss)
    state = [model.state, mx.random.state]
    compiled = mx.compile(lambda *batch: value_and_grad(model, *batch), inputs=state, outputs=state)
    return lambda _, *batch: compiled(*batch)


def compiled_update(optimizer: Any) -> Callable[[Any, Any], Any]:
    """``optimizer.apply_gradients``, compiled."""
    state = optimizer.state
    compiled = mx.compile(optimizer.apply_gradients, inputs=state, outputs=state)

    def apply_gradients(gradients: Any, parameters: Any) -> Any:
        leaves, updated = flatten_beside(gradients, parameters)
        return compiled(gradients, leaves.rebuild(updated))

    return apply_gradients


def _save_whole(sharding: Sharding, file: str, weights: dict[str, mx.array], *metadata: Any) -> None:
    """Called by the ranks that hold one whole model together: those that are the first along dp."""
    speaks = init().rank == 0
    whole = sharding.whole(weights, keep=speaks)
    if speaks:
        mx.save_safetensors(file, whole, *metadata)


# ----------------------------------------------------------------------------------- what ranks must have in common


def draw_alike(sharding: Sharding) -> None:
    """Let all ranks shuffle as rank 0 does, and ranks along tp draw the same random numbers. Collective."""
    world, first = init(), sharding.mesh.coordinates()[AXIS] == 0
    state: Any = np.random.get_state()
    kind, numbers, place, *rest = state
    *numbers, place = _sum_of_first(mx.array(np.array([*numbers, place], np.uint32)), world.rank == 0, world.group)
    np.random.set_state((kind, np.array(numbers, np.uint32), place, *rest))
    high, low = _sum_of_first(mx.random.state[0], first, sharding.mesh.group(AXIS))  # type: ignore[index]
    mx.random.seed(high << 32 | low)


def check_copies(model: Any, sharding: Sharding) -> None:
    """Raise, on every rank alike, if copies of a trained parameter differ by more than a drift. Collective."""
    placed = place(model.trainable_parameters(), sharding.layout, None, named=True)
    error, _ = contradiction(placed, placed.leaves.arrays, drift=False, what="parameters", shards_differ=False)
    if error is not None:
        raise error


def _sum_of_first(x: mx.array, first: bool, group: mx.distributed.Group) -> list[int]:
    total: Any = all_sum(x if first else mx.zeros_like(x), group).tolist()
    return list(total)


def same_batches(iterate_batches: Callable[..., Any], sharding: Sharding) -> Callable[..., Iterator[Any]]:
    """The same batches, compared over the ranks along tp, which meet there before each step.

    Raises:
        ValueError: on every rank alike, when they differ.
    """

    def iterate(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for batch in iterate_batches(*arguments, **keywords):
            mine = mx.array(_digest(batch))[None]
            if mx.any(all_gather(mine, sharding.mesh.group(AXIS)) != mine).item():
                raise ValueError(
                    "Ranks along 'tp' have different batches, and they compute one model together: give them the same "
                    "data in the same order. iterate_batches gets the ranks that split a batch as comm_group."
                )
            yield batch

    return iterate


def _digest(batch: Any) -> Any:
    digest = blake2b(digest_size=8)
    arrays: Any = tree_flatten(batch)
    for _, array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return np.frombuffer(digest.digest(), np.uint32)
