"""Does the loss rise along the gradient by the gradient's norm? Forward passes tell, on any mesh.

It is a Taylor test: ``(L(w + d) - L(w - d)) / 2`` must be the dot product of the gradient and the displacement ``d``.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from distclip.agree import first_ten
from distclip.check import check_placed
from distclip.complete import completed
from distclip.layout import Layout, LayoutError, place
from distclip.mesh import Group
from distclip.moves import DRAWS, Move, Moves
from distclip.passes import Passes

RIGHT, WRONG, UNKNOWN = "right", "wrong", "cannot tell"
STEPS = (1.0, 1 / 4, 1 / 16, 1 / 64)  # of a displacement, until it is right, or three agree that it is wrong
TOLERANCE = 0.01  # within which a slope is right, and step sizes agree
NARROW, NARROW_SIGNS = 0.03, 0.2  # the same along gradients of 8 or 11 bits, and along signs: rounding adds up there
ROWS = 150  # leaves are moved alone until the table has so many rows


@dataclass(frozen=True)
class Row:
    """The slope of the loss along one displacement.

    Attributes:
        leaves: those that moved: a path, or a pattern of paths.
        along: "the gradient", "its leaves alike" (each by as much change of the loss), or "random signs 1" or 2.
        claimed: what the gradient says of the slope, for each unit of length; along the gradient it is the norm.
        slope: what the loss says.
        error: of the slope, as a part of what the leaves claim together whatever their signs; along the gradient, of
            the norm. NaN where nothing is claimed.
        verdict: "right", "wrong" or "cannot tell".
    """

    leaves: str
    along: str
    claimed: float
    slope: float
    error: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.slope / self.claimed if self.claimed else math.nan

    def __str__(self) -> str:
        ratio = f", ratio {self.ratio:.4f}" if self.claimed else ""
        return f"{self.leaves}, along {self.along}: claimed {self.claimed:.6g}, slope {self.slope:.6g}{ratio}"


@dataclass(frozen=True)
class Slopes:
    """What :func:`check_gradient` measured, the same on every rank.

    Attributes:
        rows: of the whole gradient first; of groups of leaves where that was not right.
        verdict: "right" or "cannot tell".
    """

    rows: tuple[Row, ...]
    verdict: str

    def __str__(self) -> str:
        lines = [("leaves", "along", "claimed", "slope", "ratio", "error", "verdict")]
        for row in self.rows:
            numbers = (f"{row.claimed:.6g}", f"{row.slope:.6g}", _or_dash(row.ratio, ".4f"), _or_dash(row.error, ".2%"))
            lines.append((row.leaves, row.along, *numbers, row.verdict))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def check_gradient(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Any],
    batch: Any,
    grads: Any,
    layout: Layout,
    *,
    group: Group | None = None,
    seed: int | None = None,
) -> Slopes:
    """Raise, on every rank alike, if the loss does not rise along the gradient as the gradient says.

    Along the gradient the loss must rise by the global norm. Along its leaves, each by as much change of the loss, and
    twice along random signs, it must rise by the dot product with the gradient. That takes two forward passes each, and
    up to six more where a slope is not right at once. If the whole gradient is not right, groups of leaves and then
    leaves are moved alone, to name those that are wrong, while rank 0 shows a line of progress on a terminal.
    Collective; call it on the first step.

    Before that, the copies of each leaf and of each parameter must be the same bits (:func:`distclip.check_layout`).
    During the check parameters are float32 copies; then the model and ``mx.random`` are what they were, to the bit.
    It cannot see: a batch that is the wrong one in the loss as well; a mistake below 1 % of what all leaves claim (3 %
    where a gradient has fewer bits than float32); a loss that ignores the parameters of the model, as a compiled one
    may; what the optimizer does next.

    Args:
        model (mlx.nn.Module): with the parameters at which the gradient was computed.
        loss_fn: ``loss_fn(model, batch)`` is this rank's loss, a scalar array (or a tuple with it first), not compiled.
            Its mean over all ranks must be the loss of the whole batch.
        batch: this rank's batch, that of the gradient.
        grads: tree of arrays as they would be clipped, after an average: sharded, replicated or ``Partial``. Their
            paths and shapes are those of the model's parameters.
        layout: a placement, a tree prefix of placements, or a callable ``(path, array) -> placement``.
        group (Group, World or axis, optional): the ranks that train together. Default: the world.
        seed (int, optional): the gradient was computed right after ``mx.random.seed(seed)``. Needed only where the loss
            is random (dropout); it may differ between ranks.

    Returns:
        Slopes: a table to print, with ``rows`` and a ``verdict``, ``"right"`` or ``"cannot tell"``: step sizes disagree
        by more than 1 %, as behind the router of a mixture of experts, or the gradient is too small to be measured.

    Raises:
        LayoutError: names the leaves that are wrong; copies that differ; leaves that the model does not have.
        ValueError: the loss is random and there is no ``seed``, or the loss or the norm is not finite.
    """
    placed = completed(place(grads, layout, group, named=True), None)
    check_placed(placed, placed.leaves.arrays)
    with Passes(model, loss_fn, batch, placed.group, seed) as passes:
        return _Test(Moves(placed, passes.parameters, passes.loss), passes).run()


class _Test:
    """A gradient under test."""

    def __init__(self, moves: Moves, passes: Passes) -> None:
        self._moves, self._passes = moves, passes
        self._rows: list[Row] = []

    def run(self) -> Slopes:
        loss, norm = self._passes.loss, math.hypot(*(leaf.norm for leaf in self._moves.leaves.values()))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(f"A slope needs finite numbers; the loss is {loss} and the norm of the gradient {norm}.")
        every = list(self._moves.leaves)
        zeros = [path for path in every if self._moves.leaves[path].norm == 0]
        moves = [self._moves.along(every), self._moves.by_leaf(every), *self._signs(every)]
        rows = [self._judge("all", move) for move in moves]
        rows += [self._judge("all without a gradient", move) for move in self._signs(zeros)]
        verdict = _worst(rows)
        if verdict != RIGHT:
            verdict = self._search(every)
        if verdict == WRONG:
            raise LayoutError(_explain(self._rows))
        return Slopes(tuple(self._rows), verdict)

    def _search(self, every: list[str]) -> str:
        """Judge groups of like leaves, the leaves of those that are wrong, and then those that are unsteady at once."""
        todo, unsteady, verdicts = self._kinds(every), list[str](), []
        while todo:
            name, paths = todo.pop(0)
            self._passes.progress(f"{name} ({len(todo)} more)")
            verdicts.append(self._judge_group(name, paths))
            if verdicts[-1] == UNKNOWN:
                unsteady += paths
            elif verdicts[-1] == WRONG and len(paths) > 1 and len(self._rows) + len(todo) + len(paths) < ROWS:
                todo = [(path, [path]) for path in paths] + todo
        if unsteady:
            verdicts = [verdict for verdict in verdicts if verdict != UNKNOWN]
            verdicts.append(self._judge_group("the rest", unsteady))
        # What is right of all groups is right of their sum; and a sum may be wrong by chance where a group is unsteady.
        return next((verdict for verdict in (WRONG, UNKNOWN) if verdict in verdicts), RIGHT)

    def _kinds(self, every: list[str]) -> list[tuple[str, list[str]]]:
        """Leaves whose paths differ by numbers alone; those without a gradient apart, since others would hide them."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for path in every:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
            kinds[pattern if self._moves.leaves[path].norm else f"{pattern} without a gradient"].append(path)
        return [(name if len(paths) > 1 else paths[0], paths) for name, paths in kinds.items()]

    def _judge_group(self, name: str, paths: list[str]) -> str:
        """The verdict on some leaves: along their gradient, and along signs where that is right."""
        known = any(self._moves.leaves[path].norm for path in paths)
        rows = [self._judge(name, self._moves.along(paths))] if known else []
        if not rows or rows[0].verdict == RIGHT:
            rows += [self._judge(name, move) for move in self._signs(paths)]
        return _worst(rows)

    def _signs(self, paths: list[str]) -> list[Move]:
        return [self._moves.signs(paths, draw) for draw in range(DRAWS)] if paths else []

    def _judge(self, name: str, move: Move) -> Row:
        change, verdict = self._measure(move)
        error = abs(change - move.change) / move.scale if move.scale else math.nan
        row = Row(name, move.along, move.change / move.length, change / move.length, error, verdict)
        self._rows.append(row)
        return row

    def _measure(self, move: Move) -> tuple[float, str]:
        """By how much the loss rises along a displacement, and the verdict on that."""
        noise = self._passes.noise
        tolerance = TOLERANCE if not self._moves.narrow else NARROW if move.draw is None else NARROW_SIGNS
        seen: list[tuple[float, float]] = []  # changes that agree, and how near they had to come
        for step in STEPS:
            change = self._passes.change(self._moves.displacement(move, step)) / step
            error, near = abs(change - move.change), tolerance * move.scale + noise / step
            if error <= near:
                if move.scale == 0 and not seen:
                    return change, RIGHT  # nothing is claimed, and nothing happens
                expected = move.scale or seen[0][0]
                return change, RIGHT if expected * step > 10 * noise else UNKNOWN
            if seen and abs(change - seen[-1][0]) > TOLERANCE * max(move.scale, 5 * error) + noise / step:
                seen = []
            seen.append((change, near))
            if len(seen) == 3 and error > 2 * seen[0][1]:
                return change, WRONG
        return change, UNKNOWN


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _worst(rows: list[Row]) -> str:
    verdicts = [row.verdict for row in rows]
    return next(verdict for verdict in (WRONG, UNKNOWN, RIGHT) if verdict in verdicts)


def _explain(rows: list[Row]) -> str:
    single = [row for row in rows if row.verdict == WRONG and not row.leaves.startswith("all")]
    named = [row for row in single if "*" not in row.leaves] or single or [row for row in rows if row.verdict == WRONG]
    return "The loss does not rise along the gradient as the gradient says:\n" + first_ten(
        [f"  {row}" for row in named]
    )
