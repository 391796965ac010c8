"""Several ranks: the average and the clip of whole gradients, the clip of shards, and the bare all-reduce."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.nn.utils as nn_utils
import mlx.optimizers as optim

from distclip.average import average_and_clip
from distclip.bench.timing import Contestant, Result, eager_and_compiled, interleave, work_of
from distclip.bench.trees import Grads, average_norm, squares
from distclip.clip import clip_grad_norm
from distclip.world import World

LEAVES = 256
TYPES = {
    "float32": ["float32"] * LEAVES,
    "float32 and bfloat16": (["float32"] * (LEAVES // 4) + ["bfloat16"] * (LEAVES // 4)) * 2,
}

Case = tuple[str, list[Contestant], float]  # its name, and the norm in float64


def results(world: World, megabytes: int, rounds: int, progress: Callable[[str], None]) -> list[Result]:
    """Measure all cases, collectively. Each rank has ``megabytes`` of gradient of its own."""
    all_results = []
    for label, dtypes in TYPES.items():
        shapes = [(max(megabytes * 10**6 // LEAVES // (4 if dtype == "float32" else 2), 1),) for dtype in dtypes]
        ranks = [Grads(shapes, dtypes, seed=rank) for rank in range(world.size)]
        mine, cases = ranks[world.rank], [_average_and_clip(world, ranks)]
        if label == "float32":
            cases.append(_clip_shards(world, ranks))
        del ranks
        for case, contestants, truth in cases:
            progress(f"{case} of {label}")
            result = Result(
                part="parallel",
                case=case,
                tree=f"{LEAVES} x {megabytes / LEAVES:.3g} MB, {world.size} ranks",
                dtype=label,
                bytes=mine.bytes,
                values=mine.values,
                series=interleave(contestants, rounds, truth, world.group),
            )
            all_results.append(result)
    return all_results


def _average_and_clip(world: World, ranks: list[Grads]) -> Case:
    mine, norm = ranks[world.rank], average_norm(ranks)

    def mlx_pair(tree: Any) -> tuple[Any, mx.array]:
        return optim.clip_grad_norm(nn.average_gradients(tree, world.group), norm / 2)  # type: ignore[no-any-return]

    def distclip_pair(tree: Any) -> tuple[Any, mx.array]:
        return average_and_clip(tree, norm / 2, group=world.group)

    contestants = eager_and_compiled("distclip", distclip_pair, mine.fresh_mlx)
    contestants += eager_and_compiled("MLX", mlx_pair, mine.fresh_mlx)
    return "average and clip", [*contestants, _all_reduce(world, mine)], norm


def _clip_shards(world: World, ranks: list[Grads]) -> Case:
    mine, norm = ranks[world.rank], sum(squares(leaf) for grads in ranks for leaf in grads.raw) ** 0.5

    def distclip_clip(tree: Any) -> tuple[Any, mx.array]:
        return clip_grad_norm(tree, norm / 2, group=world.group)

    def mlx_clip(tree: Any) -> tuple[Any, mx.array]:
        return nn_utils.clip_grad_norm_sharded(tree, norm / 2, world.group)  # type: ignore[no-any-return]

    contestants = eager_and_compiled("distclip", distclip_clip, mine.fresh_mlx)
    exists = mx.array(float(hasattr(nn_utils, "clip_grad_norm_sharded")))
    if mx.distributed.all_sum(exists, group=world.group).item() == world.size:  # else a rank would wait for the others
        contestants += eager_and_compiled("MLX", mlx_clip, mine.fresh_mlx)
    return "clip shards", contestants, norm


def _all_reduce(world: World, grads: Grads) -> Contestant:
    """As many bytes, one array of each type, which is given up."""
    sizes: Counter[str] = Counter()
    for dtype, leaf in zip(grads.dtypes, grads.raw, strict=True):
        sizes[dtype] += leaf.size

    def fresh() -> list[mx.array]:
        arrays = [mx.ones((size,), getattr(mx, dtype)) for dtype, size in sizes.items()]
        mx.eval(arrays)
        return arrays

    def all_reduce(arrays: list[mx.array]) -> tuple[list[mx.array], None]:
        return [mx.distributed.all_sum(arrays.pop(), group=world.group) for _ in sizes], None

    return Contestant("bare all-reduce", fresh, work_of(all_reduce), floor=True)
