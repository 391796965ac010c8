"""An optimizer of MLX that clips, and leaves everything as it was, to the bit, on a step that is skipped."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from distclip.clipper import Clipper
from distclip.engine import kernels
from distclip.report import Report
from distclip.tree import arrays, rebuild


class ClippedOptimizer:
    """Wraps any optimizer of ``mlx.optimizers`` (``MultiOptimizer`` too), with the same interface.

    Each update clips the gradients first. When the clipper's policy is ``"skip"`` and the norm is not finite, on any
    rank, parameters and optimizer state stay what they were, bit for bit, on every rank; the schedules and the step
    count of the optimizer wait too. Works in eager loops, and inside ``mx.compile`` with ``optimizer.state`` among the
    inputs and outputs (after ``init``).

        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = ClippedOptimizer(optim.SGD(0.1), Clipper(max_norm=1.0))
        >>> before = mx.array(model.weight)
        >>> optimizer.update(model, {"weight": mx.array([[float("nan"), 1.0]])})
        >>> print(mx.array_equal(model.weight, before).item(), optimizer.report.skipped.item())
        True True

    Args:
        optimizer (mlx.optimizers.Optimizer): what updates the parameters.
        clipper (Clipper): what clips. Its layout and groups are of the gradients that ``update`` is given.

    Attributes:
        optimizer, clipper: the two.
        report (Report): of the last update; None before the first.
    """

    def __init__(self, optimizer: Any, clipper: Clipper) -> None:
        self.optimizer, self.clipper = optimizer, clipper
        self.report: Report | None = None

    def init(self, parameters: Any) -> None:
        """Make the optimizer's state, as ``Optimizer.init``, and the clipper's. Collective if the clipper's groups are
        a function."""
        self.optimizer.init(parameters)
        self.clipper.prepare(parameters)

    def update(self, model: Any, gradients: Any) -> None:
        """Clip the gradients and update the model in place, as ``Optimizer.update``. Collective, as the clipper is."""
        model.update(self.apply_gradients(gradients, model))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Clip the gradients, and return the updated parameters, as ``Optimizer.apply_gradients``.

        Args:
            gradients: tree of arrays, partial, sharded or replicated as the clipper was told.
            parameters: tree or module of arrays; it may hold more than the gradients do.

        Raises:
            FloatingPointError, LayoutError: see :class:`distclip.Clipper`.
        """
        if not self._initialized():
            self.init(gradients)
        grads, self.report = self.clipper.clip(gradients, keep_bad=True)
        skips = self.clipper.nonfinite == "skip"
        old = _leaves(self.optimizer.state) if skips else []
        updated = self.optimizer.apply_gradients(grads, parameters)
        if not skips:
            return updated
        finite = self.report.finite
        chosen = _restore(old, finite)
        # Who evaluates the parameters alone evaluates the step count too, so that it never piles up.
        (finite,) = mx.depends([finite], chosen) if chosen else (finite,)
        before = tree_map(lambda _, parameter: parameter, updated, parameters)
        return rebuild(updated, kernels.choose(finite, arrays(updated), arrays(before)))

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state and the clipper's, for checkpoints and ``mx.compile``."""
        return {"optimizer": self.optimizer.state, "clipper": self.clipper.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.optimizer.state, self.clipper.state = state["optimizer"], state["clipper"]

    @property
    def step(self) -> mx.array:
        """How many updates the optimizer has made; skipped ones do not count."""
        return self.optimizer.step  # type: ignore[no-any-return]

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizer.learning_rate  # type: ignore[no-any-return]

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.optimizer.learning_rate = learning_rate

    def _initialized(self) -> bool:
        inner = getattr(self.optimizer, "optimizers", [self.optimizer])
        return all(getattr(one, "_initialized", True) for one in inner)


def _leaves(state: Any) -> list[tuple[Any, Any, mx.array]]:
    """All arrays of a state, with the containers that hold them."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found: list[tuple[Any, Any, mx.array]] = []
    for key, value in items:
        if isinstance(value, mx.array):
            found.append((state, key, value))
        elif isinstance(value, (dict, list, tuple)):
            found += _leaves(value)
    return found


def _restore(old: list[tuple[Any, Any, mx.array]], finite: mx.array) -> list[mx.array]:
    """Put back, into the same containers, what an update has changed, unless it was good."""
    changed = [(holder, key, before) for holder, key, before in old if holder[key] is not before]
    updated = [holder[key] for holder, key, _ in changed]
    for holder, key, _ in changed:  # let go, so that the new arrays can be taken as they are
        holder[key] = None
    chosen = kernels.choose(finite, updated, [before for _, _, before in changed])
    for (holder, key, _), value in zip(changed, chosen, strict=True):
        holder[key] = value
    return chosen
