"""How many launches a tree takes on a GPU, and how many bytes: counted, since no time is measured without one."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import mlx.core as mx
import pytest
from reference import alone

from distclip.bench.trees import qwen
from distclip.engine import gpu
from distclip.engine.gpu import launches
from engine.counting import Recorder

pytestmark = alone

Shapes = list[tuple[int, ...]]
MEASURES = {"squares": gpu.sum_squares, "magnitudes": gpu.sum_abs, "largest": gpu.max_abs}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


TREES: dict[str, tuple[Shapes, mx.Dtype, int, float]] = {  # launches, and bytes for each value
    "Qwen2.5-0.5B": (qwen(), mx.bfloat16, 21, 2.1),
    "256 x 250,000": ([(250_000,)] * 256, mx.float32, 19, 4.1),
    "2,000 x 64": ([(64,)] * 2000, mx.float32, 143, 7.0),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_tree_is_read_once_in_few_launches(
    tree: tuple[Shapes, mx.Dtype, int, float], measure: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, dtype, count, bytes_per_value = tree
    joined: list[int] = []
    concatenate = mx.concatenate

    def spy(arrays: list[mx.array], *args: Any, **more: Any) -> mx.array:
        joined.extend([len(arrays)] if arrays[0].dtype == mx.float32 else [])
        return concatenate(arrays, *args, **more)

    monkeypatch.setattr(mx, "concatenate", spy)
    measure([mx.zeros(shape, dtype) for shape in shapes])  # never evaluated
    assert recorder.launches == count
    join = 2 * recorder.written  # to read and write it again
    assert recorder.read + recorder.written + join <= bytes_per_value * sum(map(math.prod, shapes))
    assert joined == [count]  # one array goes to the CPU


def test_many_small_leaves_are_scaled_in_few_launches(recorder: Recorder) -> None:
    scaled = gpu.scale([mx.zeros((64,))] * 2000, mx.array(0.5), mx.array(True))
    assert (len(scaled), recorder.launches) == (2000, 223)


def test_one_operation_takes_one_array_to_the_cpu(recorder: Recorder) -> None:
    """MLX waits for the GPU once for each array and each operation that takes it."""
    graph = io.StringIO()
    mx.export_to_dot(graph, gpu.sum_squares([mx.zeros((64,))] * 100))
    names = dict(re.findall(r'(\d+) \[label ="(\w+)"', graph.getvalue()))
    [measured] = [node for node, name in names.items() if name == "CustomTransforms"]
    [array] = re.findall(rf'^{measured} -> "(\w+)"', graph.getvalue(), flags=re.M)
    takers = re.findall(rf'^"{array}" -> (\d+)', graph.getvalue(), flags=re.M)
    assert [names[node] for node in takers] == ["AsType"]


def test_tables_are_made_once_for_a_tree(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [mx.zeros((64 + i % 3,)) for i in range(100)]
    gpu.sum_squares(leaves)
    gpu.scale(leaves, mx.array(0.5))
    monkeypatch.setattr(launches, "_table", None)  # none can be made now
    gpu.sum_abs([leaf + 1 for leaf in leaves])
    gpu.scale(leaves, mx.array(0.25))
