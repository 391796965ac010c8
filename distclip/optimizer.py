"""An optimizer of MLX that clips, and leaves everything as it was, to the bit, on a step that is skipped."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip.arguments import shown
from distclip.clipper import Clipper
from distclip.engine import kernels
from distclip.engine.streams import is_tracing
from distclip.report import Report
from distclip.snapshot import Snapshot
from distclip.thresholds import MaxNorm
from distclip.tree import Leaves, flatten_beside


class CannotUndo(ValueError):
    """In ``mx.compile`` an optimizer does what cannot be undone where a step is skipped.

    Attributes:
        obstacle (str): what it does, in words.
    """

    def __init__(self, optimizer: Any, obstacle: str) -> None:
        self.obstacle = obstacle
        super().__init__(
            f"In mx.compile a skipped step cannot be undone, since {type(optimizer).__name__} {obstacle} in its state: "
            'pass nonfinite="zero" to Clipper, or make this update outside the compiled function.'
        )


class ClippedOptimizer:
    """Wraps any optimizer that has the interface of MLX's (``MultiOptimizer`` too), and has that interface itself.

    Each update clips the gradients first. When the clipper's policy is ``"skip"`` and the norm is not finite, on
    any rank, or a spike (``skip_above``), parameters and optimizer state stay what they were, bit for bit, on every
    rank; the schedules and the step count of the optimizer wait too. The optimizer gets zeros for such gradients, or is
    not called at all where the host knows the norm: with several ranks and a GPU (:mod:`distclip.schedule`), and where
    the state holds numbers or other objects beside arrays, for which the host waits. Works in eager loops, and inside
    ``mx.compile`` with ``optimizer.state`` among the inputs and outputs (after ``init``).

        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = ClippedOptimizer(optim.SGD(0.1), Clipper(max_norm=1.0))
        >>> before = mx.array(model.weight)
        >>> optimizer.update(model, {"weight": mx.array([[float("nan"), 1.0]])})
        >>> print(mx.array_equal(model.weight, before).item(), optimizer.report.skipped.item())
        True True

    Args:
        optimizer (mlx.optimizers.Optimizer): what updates the parameters, with all that changes in its ``state``.
        clipper (Clipper): clips them first. Its layout and groups are those of the gradients given to ``update``. A
            number, a schedule or a rule makes one: ``Clipper(1.0)``.

    Attributes:
        optimizer, clipper: the two.
        report (Report): of the last update; None before the first.
    """

    def __init__(self, optimizer: Any, clipper: Clipper | MaxNorm) -> None:
        if not hasattr(optimizer, "apply_gradients") or isinstance(optimizer, type):
            raise TypeError(f"optimizer is {shown(optimizer)}; pass an optimizer of MLX first, and then the clipper")
        self.optimizer: Any = optimizer
        self.clipper: Clipper = clipper if isinstance(clipper, Clipper) else Clipper(clipper)
        self.report: Report = None  # type: ignore[assignment] # until the first update, which users need not ask for

    def __repr__(self) -> str:
        return f"ClippedOptimizer({type(self.optimizer).__name__}, {self.clipper})"

    def init(self, parameters: Any) -> None:
        """Make the optimizer's state, as ``Optimizer.init``, and the clipper's. Collective: the ranks compare the
        parameters, unless the clipper has a layout or averages, and the names of groups that a function gives."""
        self.clipper.check_parameters(parameters, parameters)
        self._init(parameters)

    def _init(self, parameters: Any) -> None:
        self.optimizer.init(parameters)
        self.clipper.prepare(parameters)

    def update(
        self,
        model: Any,
        gradients: Any,
        *,
        loss_scale: float | mx.array | None = None,
        weight: float | mx.array | None = None,
    ) -> None:
        """Clip the gradients and update the model in place, as ``Optimizer.update``. Collective, as the clipper is."""
        model.update(self.apply_gradients(gradients, model, loss_scale=loss_scale, weight=weight))

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        *,
        loss_scale: float | mx.array | None = None,
        weight: float | mx.array | None = None,
    ) -> Any:
        """Clip the gradients, and return the updated parameters, as ``Optimizer.apply_gradients``.

        Args:
            gradients: tree of arrays, partial, sharded or replicated as the clipper was told.
            parameters: tree or module of arrays; it may hold more than the gradients do.
            loss_scale (float or scalar array, optional): as in calling a :class:`distclip.Clipper`; one that changes is
                an input of a compiled function. With a loss scale float16 parameters stay float16.
            weight: of this rank in the average, as in :func:`distclip.average_gradients`.

        Raises:
            FloatingPointError, LayoutError: see :class:`distclip.Clipper`.
            ValueError: in ``mx.compile`` the optimizer does what could not be undone if a step were skipped.
        """
        if not _is_initialized(self.optimizer):
            self._init(gradients)
        self.clipper.check_parameters(gradients, parameters)
        grads, self.report, known = self.clipper.clip(gradients, loss_scale=loss_scale, weight=weight)
        narrow = "loss_scale" in self.report.arrays
        skips = self.clipper.nonfinite == "skip" and not known
        if not (skips or narrow):
            return self.optimizer.apply_gradients(grads, parameters)
        leaves, values = flatten_beside(grads, parameters)
        snapshot = Snapshot(self.optimizer.state) if skips else None
        if snapshot is not None and known is None and not snapshot.lazy and not is_tracing():
            known = not self.report.arrays["skipped"].item()
        if snapshot is not None and known is False:
            return leaves.rebuild(values)
        places, before = leaves.keys, [x.__copy__() for x in values]
        tree = self.optimizer.apply_gradients(grads, parameters)
        leaves = Leaves(tree, named=True)
        updated = leaves.arrays
        if leaves.keys != places:  # the optimizer returns more or fewer
            old = dict(zip(places, before, strict=True))
            _, values = flatten_beside(tree, parameters)
            before = [old.get(keys, value) for keys, value in zip(leaves.keys, values, strict=True)]
        if narrow:
            updated = [x.astype(b.dtype) if b.dtype == mx.float16 else x for x, b in zip(updated, before, strict=True)]
        if snapshot is not None and not known:
            updated = self._undo_if_bad(snapshot, updated, before)
        return leaves.rebuild(updated)

    def _undo_if_bad(self, snapshot: Snapshot, updated: list[mx.array], before: list[mx.array]) -> list[mx.array]:
        """The updated parameters, with the updated state, or both as they were: selected lazily if that can be."""
        taken = mx.logical_not(self.report.arrays["skipped"])
        change = snapshot.compare(self.optimizer.state)
        retyped = change.retyped or any(a.dtype != b.dtype for a, b in zip(updated, before, strict=True))
        if (change.obstacle or retyped) and not is_tracing():
            if not taken.item():
                snapshot.put_back(self.optimizer.state)
            return updated if taken.item() else before
        if change.obstacle:
            snapshot.put_back(self.optimizer.state)
            raise CannotUndo(self.optimizer, change.obstacle)
        selected = change.select(taken)
        # Who evaluates the parameters alone evaluates the step count too, so that it never piles up.
        (taken,) = mx.depends([taken], selected) if selected else (taken,)
        return kernels.select(taken, updated, before)

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


def _is_initialized(optimizer: Any) -> bool:
    parts = getattr(optimizer, "optimizers", None)  # of a MultiOptimizer, which says nothing itself
    if parts is not None:
        return all(map(_is_initialized, parts))
    return bool(getattr(optimizer, "_initialized", True))
