"""Displacements of a model's parameters along a gradient, and by how much the loss should rise along each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from distclip.agree import digest, first_ten
from distclip.check import check_placed
from distclip.engine import kernels
from distclip.layout import LayoutError, Placed, blocks, copies
from distclip.world import all_sum, gather_text

CHANGE = 0.005  # of the loss: what a displacement along the gradient is made for
MOVE = 0.01  # of the parameters: the most that a displacement moves them
DRAWS = 2  # of random signs: with a single draw an error may be at right angles to it


@dataclass(frozen=True)
class Leaf:
    """A leaf of the whole model, whichever ranks hold it.

    Attributes:
        norm: of its gradient.
        rms: the root mean square of its parameters.
        size: how many there are.
        dots: the dot product of the gradient with each draw of random signs.
    """

    path: str
    norm: float
    rms: float
    size: float
    dots: tuple[float, ...]


@dataclass(frozen=True)
class Move:
    """A displacement.

    Attributes:
        along: in words.
        draw: of the random signs; None for the gradient.
        lengths: for each leaf, how much of its gradient or of its signs is added.
        change: by how much the loss should rise.
        scale: what an error of that is compared with.
        length: the norm of the displacement.
    """

    along: str
    draw: int | None
    lengths: dict[str, float]
    change: float
    scale: float
    length: float


class Moves:
    """The displacements along a gradient. Copies move alike; each rank moves what it holds.

    Args:
        placed: the gradient.
        parameters: of this rank's model, by path.
        loss: where nothing is displaced.

    Attributes:
        leaves: of all ranks, by path.
        narrow: whether a gradient has fewer bits than float32.

    Raises:
        LayoutError: the gradients are not those of the parameters, or copies of a parameter differ.
    """

    def __init__(self, placed: Placed, parameters: dict[str, mx.array], loss: float) -> None:
        self._placed, self._loss = placed, loss
        self._grads = dict(zip(placed.leaves.paths, placed.leaves.arrays, strict=True))
        rank, pairs = placed.group.rank(), zip(placed.leaves.paths, placed.placements, strict=True)
        self._blocks = {path: blocks(placement, placed.group)[rank] for path, placement in pairs}
        names, self.narrow = self._agree(parameters)
        held = [parameters[path] for path in self._grads]
        check_placed(placed, held, what="parameters", shards_differ=False)
        self.leaves = {leaf.path: leaf for leaf in self._measure(names, held)}
        size = sum(leaf.size for leaf in self.leaves.values())
        norm = math.hypot(*(leaf.rms * math.sqrt(leaf.size) for leaf in self.leaves.values()))
        self._rms = norm / math.sqrt(size) if norm else 1.0

    def along(self, paths: Iterable[str]) -> Move:
        """Along the gradient: the slope is its norm."""
        leaves = [leaf for leaf in self._some(paths) if leaf.norm]
        norm = math.hypot(*(leaf.norm for leaf in leaves))
        length = min(CHANGE * abs(self._loss) / norm, MOVE * self._size(leaves)) if norm else 0.0
        lengths = {leaf.path: length / norm for leaf in leaves}
        return Move("the gradient", None, lengths, length * norm, length * norm, length or 1.0)

    def by_leaf(self, paths: Iterable[str]) -> Move:
        """Each leaf along its own gradient, so that each changes the loss as much: small ones count, too."""
        leaves = [leaf for leaf in self._some(paths) if leaf.norm]
        each = CHANGE * abs(self._loss) / math.sqrt(max(len(leaves), 1))
        lengths, changes = {}, []
        for leaf in leaves:
            length = min(each / leaf.norm, MOVE * self._size([leaf]))
            lengths[leaf.path] = length / leaf.norm
            changes.append(length * leaf.norm)
        total = math.hypot(*(lengths[leaf.path] * leaf.norm for leaf in leaves))
        return Move("its leaves alike", None, lengths, sum(changes), math.hypot(*changes), total or 1.0)

    def signs(self, paths: Iterable[str], draw: int) -> Move:
        """Each value up or down, by the same part of its leaf's size: leaves without a gradient move, too."""
        leaves = [leaf for leaf in self._some(paths) if leaf.size]
        lengths = {leaf.path: MOVE * (leaf.rms or self._rms) for leaf in leaves}
        change = sum(lengths[leaf.path] * leaf.dots[draw] for leaf in leaves)
        scale = math.hypot(*(lengths[leaf.path] * leaf.norm for leaf in leaves))
        total = math.hypot(*(lengths[leaf.path] * math.sqrt(leaf.size) for leaf in leaves))
        return Move(f"random signs {draw + 1}", draw, lengths, change, scale, total or 1.0)

    def displacement(self, move: Move, step: float) -> dict[str, mx.array]:
        """This rank's part of a displacement times a step, by path, lazy."""
        held = {path: length * step for path, length in move.lengths.items() if path in self._grads}
        if move.draw is None:
            return {path: self._grads[path].astype(mx.float32) * length for path, length in held.items()}
        return {path: self._signs(path, move.draw) * length for path, length in held.items()}

    def _some(self, paths: Iterable[str]) -> list[Leaf]:
        return [self.leaves[path] for path in paths]

    def _size(self, leaves: list[Leaf]) -> float:
        """The norm of the leaves' parameters; of zeros, what others of their size have."""
        return math.hypot(*((leaf.rms or self._rms) * math.sqrt(leaf.size) for leaf in leaves))

    def _signs(self, path: str, draw: int) -> mx.array:
        """Ones up and down, the same where ranks hold copies."""
        high, low = digest(f"{path} {self._blocks[path]} {draw}")
        return 2.0 * mx.random.bernoulli(0.5, self._grads[path].shape, key=mx.random.key(high << 32 | low)) - 1.0

    def _agree(self, parameters: dict[str, mx.array]) -> tuple[list[str], bool]:
        """The paths of all ranks, in one order, and whether a gradient has fewer bits than float32."""
        problems = []
        for path, grad in self._grads.items():
            if path not in parameters:
                problems.append(f"  {path}: the model has no such parameter")
            elif parameters[path].shape != grad.shape:
                problems.append(
                    f"  {path}: the gradient has shape {grad.shape}, the parameter {parameters[path].shape}"
                )
        narrow = any(grad.itemsize < 4 for grad in self._grads.values())
        mine = json.dumps({"paths": list(self._grads), "problems": problems, "narrow": narrow})
        ranks = [json.loads(text) for text in gather_text(mine, self._placed.group)]
        wrong = sorted({problem for rank in ranks for problem in rank["problems"]})
        if wrong:
            raise LayoutError("The gradients are not those of the model's parameters:\n" + first_ten(wrong))
        names = list(dict.fromkeys(path for rank in ranks for path in rank["paths"]))
        return names, any(rank["narrow"] for rank in ranks)

    def _measure(self, names: list[str], parameters: list[mx.array]) -> list[Leaf]:
        """The leaves of all ranks, each block counted once, by one collective."""
        grads, group = list(self._grads.values()), self._placed.group
        columns = [kernels.sum_squares(grads), kernels.sum_squares(parameters)]
        for draw in range(DRAWS):
            products = [grad.astype(mx.float32) * self._signs(path, draw) for path, grad in self._grads.items()]
            up, down = ([mx.maximum(sign * x, 0) for x in products] for sign in (1, -1))
            with mx.stream(mx.cpu):
                columns.append(kernels.sum_abs(up) - kernels.sum_abs(down))
        measured: Any = [column[:, 0].tolist() for column in columns]
        held = {}
        for i, (path, grad) in enumerate(self._grads.items()):
            share = 1.0 / copies(self._placed.placements[i], group)
            held[path] = [share * value for value in (grad.size, *(column[i] for column in measured))]
        with mx.stream(mx.cpu):
            table = mx.array([held.get(path, [0.0] * (3 + DRAWS)) for path in names], mx.float64)
        rows: Any = all_sum(table, group).tolist()
        return [
            Leaf(path, math.sqrt(squares), math.sqrt(parameter / size) if size else 0.0, size, tuple(dots))
            for path, (size, squares, parameter, *dots) in zip(names, rows, strict=True)
        ]
