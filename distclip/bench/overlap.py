"""What of the average is hidden behind the backward pass, where the leaves are on another stream than the collectives.

A second CPU stream plays the device. It computes, on the cores that the network needs too; or it only sleeps, as a
GPU's work takes nothing from the CPU. Both take about as long as the bare all-reduces.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from distclip.average import average_and_clip, average_gradients
from distclip.bench.timing import Contestant, Result, Series, interleave
from distclip.engine import native
from distclip.world import World, all_gather, all_sum

LAYERS, DIMS = 12, 512  # 12 MB of float32
TRIES = 5
MAX_NORM = 1e-3

Gradients = dict[str, mx.array]
Backward = Callable[[], Gradients]  # not evaluated, the last layer's first
Function = Callable[[Gradients], Any]
Steps = dict[str, Callable[[], Any]]


def overlap(world: World, rounds: int) -> list[Result]:
    """Time the average, and the clip besides, with the backward pass: by distclip, and by MLX in one evaluation."""
    device = mx.new_stream(mx.cpu)
    stored = [mx.full((DIMS, DIMS), 1e-3 * (world.rank + 1)) for _ in range(LAYERS)]
    mx.eval(stored)
    seconds = _seconds(lambda: mx.eval(_all_reduces(world, stored)), world)
    passes: dict[str, Backward] = {"computes": _computing(seconds, world, device)}
    kernel = native.load()
    if kernel is not None:
        passes["sleeps"] = _sleeping(stored, seconds / LAYERS, kernel, device)

    def mlx(grads: Gradients) -> Any:
        return nn.average_gradients(grads, world.group, communication_stream=world.stream)

    cases: dict[str, dict[str, Function]] = {
        "backward, average": {"distclip": partial(average_gradients, group=world.group), "MLX": mlx},
        "backward, average, clip": {
            "distclip": lambda grads: average_and_clip(grads, MAX_NORM, group=world.group),
            "MLX": lambda grads: optim.clip_grad_norm(mlx(grads), MAX_NORM),
        },
    }
    results = []
    nbytes, whole = sum(x.nbytes for x in stored), "the shorter of backward pass and all-reduces"
    for kind, backward in passes.items():
        floors: Steps = {"backward alone": backward, "all-reduces alone": lambda: _all_reduces(world, stored)}
        for case, functions in cases.items():
            steps: Steps = {name: partial(_after, backward, function) for name, function in functions.items()}
            contestants = [_contestant(name, step, device) for name, step in {**steps, **floors}.items()]
            series = interleave(contestants, rounds, None, world.group)
            about = ("overlap", case, f"{LAYERS} x 1 MB, a device that {kind}, {world.size} ranks", "float32")
            hidden = _hidden(series) if case == "backward, average" else {}
            results.append(Result(*about, nbytes, nbytes // 4, series, hidden, whole))
    return results


def _after(backward: Backward, function: Function) -> Any:
    return function(backward())


def _contestant(name: str, step: Callable[[], Any], device: mx.Stream) -> Contestant:
    def work(_: list[Any]) -> tuple[Any, Any]:
        with mx.stream(device):
            mx.eval(step())
        return None, None

    return Contestant(name, lambda: None, work, floor="alone" in name)


def _hidden(series: list[Series]) -> dict[str, float]:
    """The part of the shorter of backward pass and all-reduces that is not waited for."""
    *steps, backward, reduces = series
    shorter, both = min(backward.median, reduces.median), backward.median + reduces.median
    return {f"hidden by {s.name}": (both - s.median) / shorter for s in steps}


def _all_reduces(world: World, arrays: list[mx.array]) -> list[mx.array]:
    return [all_sum(x, world.group) for x in arrays]


def _sleeping(stored: list[mx.array], seconds: float, kernel: native.Kernel, device: mx.Stream) -> Backward:
    first = mx.zeros(())
    mx.eval(first)

    def backward() -> Gradients:
        grads, made = {}, first
        for i in reversed(range(LAYERS)):
            made = kernel.sleep(made, seconds, device)
            (grads[f"{i}"],) = mx.depends([stored[i]], made)
        return {name: grads[name] for name in sorted(grads, key=int)}

    return backward


def _computing(seconds: float, world: World, device: mx.Stream) -> Backward:
    mx.random.seed(0)
    model = nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(DIMS, DIMS, bias=False), nn.ReLU())])
    mx.eval(model.parameters())
    gradient = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

    def of(rows: int) -> Backward:
        x = mx.random.normal((rows, DIMS), key=mx.random.key(world.rank))
        mx.eval(x)

        def backward() -> Gradients:
            flat: Any = tree_flatten(gradient(model, x)[1])
            return dict(flat)

        return backward

    def run(rows: int) -> None:
        with mx.stream(device):
            mx.eval(of(rows)())

    few, many = (_seconds(lambda rows=rows: run(rows), world) for rows in (8, 72))  # type: ignore[misc]
    return of(max(round(8 + 64 * (seconds - few) / (many - few)), 1))


def _seconds(run: Callable[[], Any], world: World) -> Any:
    """The median time of a few runs on the slowest rank, the same number on every rank."""
    times = []
    for _ in range(TRIES):
        world.barrier()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    every: Any = all_gather(mx.array([median(times)]), world.group)
    return max(every.tolist())
