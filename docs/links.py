"""Measure what the norm's one collective costs on the links at hand, beside other ways to agree on a norm.

    mpirun -n 4 --hostfile hosts python docs/links.py           a minute or less; prints a Markdown table

The ways take turns, in one run: distclip's one all-reduce of 16 bytes; one scalar for each axis of the mesh, one after
the other; one scalar for each leaf of the model of launch/train.py, and for each of 300 leaves. Mesh and step are those
of ``launch/train.py --parallel dp+tp`` with its other options as they are by default, on the same links and without a
norm: forward, backward, the average over ``dp``, the update. A share is a way's part of both together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from statistics import quantiles
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import distclip as dc
from distclip.bench.timing import Contestant, interleave

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import train

ROUNDS = 60
MANY_LEAVES = 300

Work = Callable[[list[Any]], tuple[Any, None]]


def work_of(act: Callable[[Any], Any]) -> Work:
    """What is timed: the act on what is in the box, until its result is there."""

    def work(box: list[Any]) -> tuple[Any, None]:
        result = act(box.pop())
        mx.eval(result)
        return result, None

    return work


def one(local: mx.array) -> mx.array:
    return mx.distributed.all_sum(local, stream=mx.cpu)


def by_axis(mesh: dc.Mesh, axes: list[str]) -> Callable[[mx.array], mx.array]:
    def agree(local: mx.array) -> mx.array:
        for axis in axes:
            local = mx.distributed.all_sum(local, group=mesh.group(axis), stream=mx.cpu)
        return local

    return agree


def by_leaf(local: list[mx.array]) -> list[mx.array]:
    return [mx.distributed.all_sum(scalar, stream=mx.cpu) for scalar in local]


def array_of(length: int, dtype: mx.Dtype) -> mx.array:
    array = mx.zeros(length, dtype, stream=mx.cpu)
    mx.eval(array)
    return array


def scalars(n: int) -> list[mx.array]:
    return [array_of(1, mx.float32) for _ in range(n)]


def step_of(mesh: dc.Mesh) -> tuple[Callable[[Any], Any], int]:
    """The training step of launch/train.py without its clipping, and the number of its model's leaves."""
    args = train.parse([])
    mx.random.seed(args.seed)
    model = train.ByteLM(args.dims, args.heads, args.layers)
    train.shard(model, mesh)
    optimizer = optim.AdamW(args.learning_rate, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    text, numbers = train.Text(args.data, args.context, args.seed), count()
    reader, readers = mesh.coordinates()["dp"], mesh.size("dp")
    loss_and_grad = nn.value_and_grad(model, train.loss_fn)

    def step(_: Any) -> Any:
        loss, grads = loss_and_grad(model, text.batch("train", args.batch_size, next(numbers), reader, readers))
        mx.eval(loss, grads)
        optimizer.update(model, dc.average_gradients(grads, group=mesh.group("dp")))
        return model.parameters(), optimizer.state

    return step, len(tree_flatten(model.trainable_parameters()))


def main() -> None:
    world = dc.init()
    if world.size == 1:
        raise SystemExit("docs/links.py measures links between ranks: mpirun -n 4 python docs/links.py")
    mesh = train.make_mesh("dp+tp", world.size)
    axes = [axis for axis, size in mesh.axes.items() if size > 1]
    step, leaves = step_of(mesh)
    ways: list[tuple[str, int, Contestant]] = []

    def way(name: str, collectives: int, fresh: Callable[[], Any], act: Callable[[Any], Any]) -> None:
        ways.append((name, collectives, Contestant(name, fresh, work_of(act))))

    way("one all-reduce, as distclip", 1, lambda: array_of(2, mx.float64), one)
    if len(axes) > 1:
        way(f"one for each axis ({', '.join(axes)})", len(axes), lambda: array_of(1, mx.float32), by_axis(mesh, axes))
    for n, what in ((leaves, "of launch/train.py"), (MANY_LEAVES, "of a larger model")):
        way(f"one for each leaf {what}", n, partial(scalars, n), by_leaf)
    way("the step", 0, lambda: None, step)

    series = interleave([contestant for _, _, contestant in ways], ROUNDS, None, world.group)
    if world.rank > 0:
        return
    step_s = series[-1].median
    print("| | collectives | median, ms | p90, ms | share of the step |\n| --- | --- | --- | --- | --- |")
    for (name, collectives, _), found in zip(ways, series, strict=True):
        p90 = quantiles(found.seconds, n=10)[-1]
        share = f"{found.median / (step_s + found.median):.1%}" if collectives else ""
        print(f"| {name} | {collectives or ''} | {found.median * 1e3:.2f} | {p90 * 1e3:.2f} | {share} |")


if __name__ == "__main__":
    main()
