"""Read from a graph, without evaluating it: the order in which it makes arrays, and whether messages must pass."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from pathlib import Path

import mlx.core as mx

from distclip.engine import native

EDGE = re.compile(r'^"(?P<read>.+)" -> (?P<reader>\d+)$|^(?P<maker>\d+) -> "(?P<made>.+)"$', re.MULTILINE)
MESSAGE = re.compile(r'\[label ="(Send|Recv)"')


def order_of_making(arrays: list[mx.array]) -> list[int] | None:
    """The numbers of arrays, those first that fewer operations must precede; None if all of them have values.

    A backward pass makes the gradients of the last layers first, after the shortest chains of operations.
    """
    kernel = native.load()
    depths = _depths(arrays) if kernel is None else kernel.depths(arrays)
    return sorted(range(len(arrays)), key=lambda i: depths[i]) if any(depths) else None


def waits_for_messages(arrays: list[mx.array]) -> bool:
    """Whether messages between two ranks (``mx.distributed.send``, ``recv``) must pass before arrays have values."""
    return MESSAGE.search(_drawing(arrays)) is not None


def _depths(arrays: list[mx.array]) -> list[int]:
    """As the native kernel's ``depths``, from MLX's drawing of the graph."""
    drawing = _drawing(arrays)
    operations: dict[str, int] = defaultdict(int)
    made: dict[str, int] = defaultdict(int)
    for edge in EDGE.finditer(drawing):  # MLX draws an operation after those that make its inputs
        if edge["reader"]:
            operations[edge["reader"]] = max(operations[edge["reader"]], made[edge["read"]])
        else:
            made[edge["made"]] = operations[edge["maker"]] + 1
    return [made[f"array {i}"] for i in range(len(arrays))]


def _drawing(arrays: list[mx.array]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), **{f"array {i}": x for i, x in enumerate(arrays)})
        return file.read_text()
