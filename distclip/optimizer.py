"""An optimizer of MLX that clips, and leaves everything as it was, to the bit, on a step that is skipped."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip.clipper import Clipper
from distclip.engine import kernels
from distclip.report import Report
from distclip.tree import flatten_beside


class ClippedOptimizer:
    """Wraps any optimizer of ``mlx.optimizers`` (``MultiOptimizer`` too), with the same interface.

    Each update clips the gradients first. When the clipper's policy is ``"skip"`` and the norm is not finite, on
    any rank, or a spike (``skip_above``), parameters and optimizer state stay what they were, bit for bit, on every
    rank; the schedules and the step count of the optimizer wait too. With several ranks and a GPU the host waits for
    the norm (:mod:`distclip.schedule`), and a bad step does not call the optimizer at all. Works in eager loops, and
    inside ``mx.compile`` with ``optimizer.state`` among the inputs and outputs (after ``init``).

        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = ClippedOptimizer(optim.SGD(0.1), Clipper(max_norm=1.0))
        >>> before = mx.array(model.weight)
        >>> optimizer.update(model, {"weight": mx.array([[float("nan"), 1.0]])})
        >>> print(mx.array_equal(model.weight, before).item(), optimizer.report.skipped.item())
        True True

    Args:
        optimizer (mlx.optimizers.Optimizer): what updates the parameters.
        clipper (Clipper): clips them first. Its layout and groups are those of the gradients given to ``update``. A
            number, a schedule or a rule makes one: ``Clipper(1.0)``.

    Attributes:
        optimizer, clipper: the two.
        report (Report): of the last update; None before the first.
    """

    def __init__(self, optimizer: Any, clipper: Any) -> None:
        if not hasattr(optimizer, "apply_gradients"):
            raise TypeError(f"optimizer is {optimizer!r}; pass an optimizer of MLX first, and then the clipper")
        self.optimizer, self.clipper = optimizer, clipper if hasattr(clipper, "prepare") else Clipper(clipper)
        self.report: Report = None  # type: ignore[assignment] # until the first update, which users need not ask for

    def init(self, parameters: Any) -> None:
        """Make the optimizer's state, as ``Optimizer.init``, and the clipper's. Collective if the clipper's groups are
        a function."""
        self.optimizer.init(parameters)
        self.clipper.prepare(parameters)

    def update(self, model: Any, gradients: Any, *, weight: float | mx.array | None = None) -> None:
        """Clip the gradients and update the model in place, as ``Optimizer.update``. Collective, as the clipper is."""
        model.update(self.apply_gradients(gradients, model, weight=weight))

    def apply_gradients(self, gradients: Any, parameters: Any, *, weight: float | mx.array | None = None) -> Any:
        """Clip the gradients, and return the updated parameters, as ``Optimizer.apply_gradients``.

        Args:
            gradients: tree of arrays, partial, sharded or replicated as the clipper was told.
            parameters: tree or module of arrays; it may hold more than the gradients do.
            weight: of this rank in the average, as in :func:`distclip.average_gradients`.

        Raises:
            FloatingPointError, LayoutError: see :class:`distclip.Clipper`.
        """
        parts = getattr(self.optimizer, "optimizers", [self.optimizer])
        if not all(getattr(optimizer, "_initialized", True) for optimizer in parts):
            self.init(gradients)
        self.clipper.check_parameters(gradients, parameters)
        grads, self.report, known = self.clipper.clip(gradients, weight=weight, keep_bad=True)
        skips = self.clipper.nonfinite == "skip" and not known
        if skips and known is False:
            leaves, before = flatten_beside(grads, parameters)
            return leaves.rebuild(before)
        old = _leaves(self.optimizer.state) if skips else []
        updated = self.optimizer.apply_gradients(grads, parameters)
        if not skips:
            return updated
        finite = mx.logical_not(self.report.arrays["skipped"])
        selected = _restore(old, finite)
        # Who evaluates the parameters alone evaluates the step count too, so that it never piles up.
        (finite,) = mx.depends([finite], selected) if selected else (finite,)
        leaves, before = flatten_beside(updated, parameters)
        return leaves.rebuild(kernels.select(finite, leaves.arrays, before))

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state and the clipper's, for checkpoints and ``mx.compile``."""
        return {"optimizer": self.optimizer.state, "clipper": self.clipper.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.clipper.state = state["clipper"]  # first: it may be refused
        self.optimizer.state = state["optimizer"]

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


def _leaves(state: Any) -> list[tuple[Any, Any, mx.array]]:
    """All arrays of a state, each with its container and its key there."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    leaves: list[tuple[Any, Any, mx.array]] = []
    for key, value in items:
        if isinstance(value, mx.array):
            leaves.append((state, key, value))
        elif isinstance(value, (dict, list, tuple)):
            leaves += _leaves(value)
    return leaves


def _restore(old: list[tuple[Any, Any, mx.array]], finite: mx.array) -> list[mx.array]:
    """Put back, into the same containers, what an update has changed, unless it was good."""
    changed = [(container, key, before) for container, key, before in old if container[key] is not before]
    updated = [container[key] for container, key, _ in changed]
    for container, key, _ in changed:  # let go, so that the new arrays can be donated
        container[key] = None
    selected = kernels.select(finite, updated, [before for _, _, before in changed])
    for (container, key, _), value in zip(changed, selected, strict=True):
        container[key] = value
    return selected
