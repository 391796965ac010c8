"""Measure the cost of the norm's one collective on the links at hand, beside other strategies to agree on a norm.

    mpirun -n 4 --hostfile hosts python docs/links.py           a minute or less; prints a Markdown table

The strategies take turns in one run: distclip's all-reduce of 16 bytes; a scalar for each axis of the mesh, one after
the other; a scalar for each leaf of the model of launch/train.py; a scalar for each of 300 leaves. Mesh and step are
those of ``launch/train.py --parallel dp+tp`` with its default options, on the same links and without a norm: forward,
backward, the average over ``dp``, the update. The share is strategy / (strategy + step).
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


def timed(function: Callable[[Any], Any]) -> Work:
    """The function to time: takes its argument from the box, and evaluates the result."""

    def work(box: list[Any]) -> tuple[Any, None]:
        result = function(box.pop())
        mx.eval(result)
        return result, None

    return work


def all_sum(local: mx.array) -> mx.array:
    return mx.distributed.all_sum(local, stream=mx.cpu)


def by_axis(mesh: dc.Mesh, axes: list[str]) -> Callable[[mx.array], mx.array]:
    def sum_over_axes(local: mx.array) -> mx.array:
        for axis in axes:
            local = mx.distributed.all_sum(local, group=mesh.group(axis), stream=mx.cpu)
        return local

    return sum_over_axes


def by_leaf(local: list[mx.array]) -> list[mx.array]:
    return [all_sum(scalar) for scalar in local]


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
    strategies: list[tuple[int, Contestant]] = []

    def add(name: str, collectives: int, argument: Callable[[], Any], function: Callable[[Any], Any]) -> None:
        strategies.append((collectives, Contestant(name, argument, timed(function))))

    add("one all-reduce, as distclip", 1, lambda: array_of(2, mx.float64), all_sum)
    if len(axes) > 1:
        add(f"one for each axis ({', '.join(axes)})", len(axes), lambda: array_of(1, mx.float32), by_axis(mesh, axes))
    for n, model in ((leaves, "of launch/train.py"), (MANY_LEAVES, "of a larger model")):
        add(f"one for each leaf {model}", n, partial(scalars, n), by_leaf)
    add("the step", 0, lambda: None, step)

    series = interleave([contestant for _, contestant in strategies], ROUNDS, None, world.group)
    if world.rank > 0:
        return
    step_s = series[-1].median
    print("| | collectives | median, ms | p90, ms | share of the step |\n| --- | --- | --- | --- | --- |")
    for (collectives, contestant), times in zip(strategies, series, strict=True):
        p90 = quantiles(times.seconds, n=10)[-1]
        share = f"{times.median / (step_s + times.median):.1%}" if collectives else ""
        row = [contestant.name, collectives or "", f"{times.median * 1e3:.2f}", f"{p90 * 1e3:.2f}", share]
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
