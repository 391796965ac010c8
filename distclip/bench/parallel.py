"""What is measured on several ranks: the data parallel pair, the clip of shards, and the bare all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.nn.utils as nn_utils
import mlx.optimizers as optim

from distclip.average import average_and_clip
from distclip.bench.timing import Contestant, Result, Series, interleave
from distclip.bench.trees import Grads, average_norm, squares
from distclip.clip import clip_grad_norm
from distclip.world import World

LEAVES = 256
Clip = Callable[..., tuple[Any, mx.array]]


def results(world: World, megabytes: int, rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Collective. Each rank has ``megabytes`` of gradient of its own."""
    found = []
    single, mixed = ["float32"] * LEAVES, (["float32"] * (LEAVES // 4) + ["bfloat16"] * (LEAVES // 4)) * 2
    for label, dtypes in (("float32", single), ("float32 and bfloat16", mixed)):
        shapes = [(max(megabytes * 10**6 // LEAVES // (4 if dtype == "float32" else 2), 1),) for dtype in dtypes]
        ranks = [Grads(shapes, dtypes, seed=rank) for rank in range(world.size)]
        mine = ranks[world.rank]
        cases = [("average and clip", _pair(world, mine, average_norm(ranks) / 2), average_norm(ranks))]
        if label == "float32":
            whole = sum(squares(raw) for one in ranks for raw in one.raw) ** 0.5
            cases.append(("clip shards", _shards(world, mine, whole / 2), whole))
        del ranks
        for case, contestants, truth in cases:
            say(f"{case} of {label}")
            series: list[Series] = interleave(contestants, rounds, truth, world.group)
            tree = f"{LEAVES} x {megabytes / LEAVES:.3g} MB, {world.size} ranks"
            found.append(Result("parallel", case, tree, label, mine.bytes, mine.values, series))
    return found


def _pair(world: World, grads: Grads, max_norm: float) -> list[Contestant]:
    def mlx_pair(tree: Any) -> tuple[Any, mx.array]:
        clip: Clip = optim.clip_grad_norm
        return clip(nn.average_gradients(tree, world.group), max_norm)

    def distclip_pair(tree: Any) -> tuple[Any, mx.array]:
        return average_and_clip(tree, max_norm, group=world.group)

    found = _eager_and_compiled("distclip", distclip_pair, grads)
    found += _eager_and_compiled("MLX", mlx_pair, grads)
    return [*found, _all_reduce(world, grads)]


def _shards(world: World, grads: Grads, max_norm: float) -> list[Contestant]:
    def distclip_clip(tree: Any) -> tuple[Any, mx.array]:
        return clip_grad_norm(tree, max_norm, group=world.group)

    found = _eager_and_compiled("distclip", distclip_clip, grads)
    here = mx.array(float(hasattr(nn_utils, "clip_grad_norm_sharded")))
    if mx.distributed.all_sum(here, group=world.group).item() == world.size:  # else a rank would wait for the others

        def mlx_clip(tree: Any) -> tuple[Any, mx.array]:
            return nn_utils.clip_grad_norm_sharded(tree, max_norm, world.group)  # type: ignore[no-any-return]

        found += _eager_and_compiled("MLX", mlx_clip, grads)
    return found


def _eager_and_compiled(name: str, clip: Clip, grads: Grads) -> list[Contestant]:
    def work_of(way: Any) -> Callable[[list[Any]], tuple[Any, Any]]:
        def work(box: list[Any]) -> tuple[Any, Any]:
            clipped, norm = way(box.pop())
            mx.eval(clipped, norm)
            return clipped, norm

        return work

    return [
        Contestant(name, grads.fresh_mlx, work_of(clip)),
        Contestant(f"{name}, compiled", grads.fresh_mlx, work_of(mx.compile(clip))),
    ]


def _all_reduce(world: World, grads: Grads) -> Contestant:
    """As many bytes, one array of each type, which is given up."""
    sizes = {
        dtype: sum(raw.size for _, raw in alike)
        for dtype, alike in groupby(sorted(zip(grads.dtypes, grads.raw, strict=True), key=_dtype), key=_dtype)
    }

    def fresh() -> list[mx.array]:
        arrays = [mx.ones((size,), getattr(mx, dtype)) for dtype, size in sizes.items()]
        mx.eval(arrays)
        return arrays

    def work(box: list[Any]) -> tuple[Any, Any]:
        arrays = box.pop()
        summed = [mx.distributed.all_sum(arrays.pop(), group=world.group) for _ in sizes]
        mx.eval(summed)
        return summed, None

    return Contestant("bare all-reduce", fresh, work, floor=True)


def _dtype(pair: tuple[str, Any]) -> str:
    return pair[0]
