"""What distclip's passes cost a device, counted where there is none: launches, bytes, waits for the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from devices import play_device
from mlx.optimizers import clip_grad_norm as clip_grad_norm_of_mlx
from mlx.utils import tree_flatten
from reference import alone

import distclip as dc
from distclip.bench.trees import qwen
from distclip.engine import kernels, operations
from engine.counting import Recorder, count

pytestmark = [
    alone,
    pytest.mark.skipif(kernels.native_kernel(None) is None, reason="the native kernel reads the graph"),
]

TARGETS = {
    "transformer": (50, 2.1),
    "256 x 1 MB": (45, 4.1),
    "2,000 x 64": (300, 7.0),
}  # for a norm by the GPU's kernels
MLX = {"transformer": (1040, 6.0), "256 x 1 MB": (1025, 12.0), "2,000 x 64": (6001, 12.25)}


@cache
def leaves_of(tree: str) -> list[mx.array]:
    leaves = {
        "transformer": lambda: [mx.zeros(shape, mx.bfloat16) for shape in qwen()],  # 290 leaves, 494 million values
        "256 x 1 MB": lambda: [mx.zeros((250_000,)) for _ in range(256)],
        "2,000 x 64": lambda: [mx.zeros((64,)) for _ in range(2000)],
    }[tree]()
    mx.eval(leaves)
    return leaves


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> mx.Stream:
    return play_device(monkeypatch)


trees = pytest.mark.parametrize("tree", MLX)


@trees
def test_what_mlx_needs(tree: str, device: mx.Stream) -> None:
    leaves = leaves_of(tree)
    with mx.stream(device):
        clipped, norm = clip_grad_norm_of_mlx(leaves, 1.0)
    counts = count([norm], device)
    launches, a_value = MLX[tree]
    assert counts.launches == launches
    assert counts.per_value(leaves) == pytest.approx(a_value, abs=0.01)
    mx.eval(norm)
    assert count(clipped, device).launches == len(leaves) + 3  # for the scale, which is a number


@pytest.mark.parametrize("measure", ["sum_squares", "sum_abs", "max_abs"])
@trees
def test_operations_need_no_more_than_mlx_for_a_norm(tree: str, measure: str, device: mx.Stream) -> None:
    leaves = leaves_of(tree)
    counts = count([getattr(operations, measure)(leaves, device)], device)
    launches, a_value = MLX[tree]
    assert counts.launches <= launches
    assert counts.per_value(leaves) <= a_value
    assert counts.bytes_to_cpu <= 4 * 2000 * 64  # small leaves, and a value of each of the others
    assert counts.waits == 0


@pytest.mark.parametrize("finite", [None, True])
@trees
def test_operations_scale_a_leaf_in_one_launch(tree: str, finite: bool | None, device: mx.Stream) -> None:
    leaves = leaves_of(tree)
    flag = None if finite is None else mx.array(finite)
    counts = count(operations.scale(leaves, mx.array(0.5), flag, device), device)
    assert counts.launches == len(leaves)
    assert counts.per_value(leaves) == pytest.approx(2 * leaves[0].itemsize, abs=0.2)
    # A factor of its own for each leaf costs nothing more.
    factors = mx.full((len(leaves),), 0.5)
    mx.eval(factors)
    assert count(operations.scale(leaves, factors, flag, device), device).launches == len(leaves)


def mixed(path: str, leaf: mx.array) -> Any:
    return dc.Replicated() if hash(path) % 2 else dc.Sharded()


CLIPS: dict[str, Callable[[list[mx.array], mx.Stream], Any]] = {
    "propagate": lambda grads, on: dc.clip_grad_norm(grads, 1.0, stream=on),
    "zero": lambda grads, on: dc.clip_grad_norm(grads, 1.0, nonfinite="zero", stream=on),
    "1-norm": lambda grads, on: dc.clip_grad_norm(grads, 1.0, norm_type=1, stream=on),
    "inf-norm": lambda grads, on: dc.clip_grad_norm(grads, 1.0, norm_type=math.inf, stream=on),
    "mixed layout": lambda grads, on: dc.clip_grad_norm(grads, 1.0, layout=mixed, stream=on),
    "average": lambda grads, on: dc.average_and_clip(grads, 1.0, nonfinite="zero", stream=on),
    "norm known": lambda grads, on: dc.clip_grads_with_norm(grads, 1.0, mx.array(2.0) + 1, stream=on),
    "skip": lambda grads, on: clipped_by(grads, 1.0, stream=on),
    "groups": lambda grads, on: clipped_by(grads, 1.0, groups=by_tens, stream=on),
    "AdaGC": lambda grads, on: clipped_by(grads, dc.AdaGC(), loss_scale=2.0, stream=on),
    "AutoClip": lambda grads, on: clipped_by(grads, dc.AutoClip(), layout=mixed, nonfinite="zero", stream=on),
    "ranks": lambda grads, on: clipped_by(grads, dc.ZClip(), average=True, rank_batch=2, stream=on),
}


def by_tens(path: str) -> str:
    return path[:-1]


def clipped_by(grads: list[mx.array], max_norm: Any, **options: Any) -> Any:
    clipper = dc.Clipper(max_norm, check="never", **options)
    clipper.prepare(grads)
    clipped, report = clipper(grads)
    return clipped, report.arrays, clipper.state


def arrays_of(tree: Any) -> list[mx.array]:
    flat: Any = tree_flatten(tree)
    return [array for _, array in flat]


@pytest.mark.parametrize("clip", CLIPS)
@trees
def test_a_clip(tree: str, clip: str, device: mx.Stream) -> None:
    leaves = leaves_of(tree)
    outputs = arrays_of(CLIPS[clip](leaves, device))
    counts = count(outputs, device)
    launches, a_value = MLX[tree]
    norms = {"norm known": 0, "ranks": 2}.get(clip, 1)  # to take: the ranks' own, and that of the average
    scalars = 80  # to compute thresholds and counters
    assert counts.launches <= norms * launches + len(leaves) + scalars
    assert counts.per_value(leaves) <= norms * a_value + 2 * leaves[0].itemsize + 4
    assert counts.waits == 1  # for the norm
    assert len(counts.arrays_to_cpu) <= 2 * norms  # small leaves, and what the others gave


@pytest.mark.parametrize("measure", ["sum_squares", "sum_abs", "max_abs"])
@trees
def test_the_kernels_of_a_gpu_need_few_launches(
    tree: str, measure: str, device: mx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, recorder = leaves_of(tree), Recorder(monkeypatch)
    counts = count([getattr(kernels, measure)(leaves, device)], device)
    launches, a_value = TARGETS[tree]
    assert recorder.launches + counts.launches <= launches
    assert (recorder.bytes + counts.bytes) / sum(leaf.size for leaf in leaves) <= a_value
    assert (counts.waits, len(counts.arrays_to_cpu)) == (0, 1)


@pytest.mark.parametrize("clip", CLIPS)
@trees
def test_a_clip_by_the_kernels_of_a_gpu(
    tree: str, clip: str, device: mx.Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, recorder = leaves_of(tree), Recorder(monkeypatch)
    outputs = arrays_of(CLIPS[clip](leaves, device))
    counts = count(outputs, device)
    launches, a_value = TARGETS[tree]
    norms = {"norm known": 0, "ranks": 2}.get(clip, 1)
    assert recorder.launches + counts.launches <= norms * launches + len(leaves) + 80
    if tree == "2,000 x 64":  # small leaves share launches
        assert recorder.launches + counts.launches <= norms * launches + 310
    others = 0.01 if leaves[0].size > 64 else 30  # tables, factors, counters
    read_and_written = (recorder.bytes + counts.bytes) / sum(leaf.size for leaf in leaves)
    assert read_and_written <= norms * a_value + 2 * leaves[0].itemsize + others
    assert (counts.waits, len(counts.arrays_to_cpu)) == (1, norms)
