"""What a device would do for arrays that are not evaluated: launches, bytes, and what crosses between it and the CPU.

A second CPU stream plays the device. The rules are those of MLX's Metal backend: a view launches nothing, a
concatenation copies each input, a full sum of more than 4,096 values takes two kernels, and the device waits for each
operation of its own that reads what the CPU makes, once for each such input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from distclip.engine import gpu
from distclip.engine.gpu import source
from distclip.engine.native import Node, load
from distclip.engine.streams import Stream, working_on

VIEWS = {
    "AsStrided",
    "Broadcast",
    "CustomTransforms",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Full",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}
REDUCTIONS = {"Sum", "Max", "Min", "Prod"}
LARGEST_SINGLE_REDUCTION = 4096  # values that a kernel reduces with one threadgroup


@dataclass
class Counts:
    launches: int = 0
    bytes: int = 0  # that the device reads and writes
    waits: int = 0  # of the device for the CPU
    arrays_to_cpu: set[int] = field(default_factory=set)  # that the device makes and the CPU reads
    bytes_to_cpu: int = 0

    def per_value(self, leaves: list[mx.array]) -> float:
        return self.bytes / sum(leaf.size for leaf in leaves)


def count(outputs: list[mx.array], stream: mx.Stream) -> Counts:
    """What the device does before arrays have values.

    Args:
        stream: of the device.
    """
    kernel = load()
    assert kernel is not None, "the graph is read by the native kernel's module"
    counts = Counts()
    made_by: dict[int, mx.Stream] = {}  # the stream that makes an array
    read: dict[int, int] = {}  # the bytes to read of an array that is a view of less
    for node in kernel.graph(outputs):
        made_by |= dict.fromkeys((array for array, _, _ in node.outputs), node.stream)
        if node.name in ("Broadcast", "Full"):
            read[node.outputs[0][0]] = sum(read.get(array, nbytes) for array, _, nbytes in node.inputs)
        makers = [made_by.get(array, node.stream) for array, _, _ in node.inputs]
        if node.stream == stream:
            counts.waits += sum(maker != stream for maker in makers)
            if node.name not in VIEWS:
                counts.launches += _launches(node)
                counts.bytes += sum(read.get(array, nbytes) for array, _, nbytes in node.inputs)
                counts.bytes += sum(nbytes for _, _, nbytes in node.outputs)
            continue
        for (array, _, nbytes), maker in zip(node.inputs, makers, strict=True):
            if maker == stream and array not in counts.arrays_to_cpu:
                counts.arrays_to_cpu.add(array)
                counts.bytes_to_cpu += nbytes
    return counts


def _launches(node: Node) -> int:
    inputs, outputs = node.inputs, node.outputs
    if node.name == "Concatenate":
        return len(inputs)
    if node.name in REDUCTIONS and outputs[0][1] == 1 and inputs[0][1] > LARGEST_SINGLE_REDUCTION:
        return 2
    return 1


class Recorder:
    """In place of MLX's GPU kernels: counts their launches, and gives arrays that depend on what they would read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = self.read = self.written = 0
        monkeypatch.setattr(source, "backend", lambda: "metal")
        monkeypatch.setattr(source, "kernel", lambda _: self.launch)
        monkeypatch.setattr(gpu, "load", lambda: gpu)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def launch(
        self,
        *,
        inputs: list[mx.array],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        stream: Stream,
        **_: Any,
    ) -> list[mx.array]:
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(outputs)
        self.launches += 1
        self.read += sum({id(x): x.nbytes for x in inputs}.values())
        self.written += sum(x.nbytes for x in outputs)
        with working_on(stream):
            waiting: list[mx.array] = mx.depends(outputs, inputs)
        return waiting
