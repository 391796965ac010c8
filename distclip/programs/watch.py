"""Follow a clipper whose steps a trainer makes: read each step between two of them, and say what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distclip.clipper import Clipper
from distclip.optimizer import ClippedOptimizer
from distclip.report import Report
from distclip.world import init

BAD = {"skip": "skipped", "zero": "taken with zeros for gradients", "propagate": "taken as it is"}


class Reporting(ClippedOptimizer):
    """Keeps its last report in its state: a trainer's compiled step hands out nothing else."""

    def apply_gradients(self, gradients: Any, parameters: Any, **options: Any) -> Any:
        try:
            return super().apply_gradients(gradients, parameters, **options)
        finally:
            if self.report is not None:  # the step counts, whatever the optimizer made of it
                self.clipper.state["report"] = dict(self.report.arrays)


class Watch:
    """Reads a clipper's state between the steps of a trainer. Rank 0 says what was skipped.

    Args:
        clipper: of a :class:`Reporting`.
        on_step: called with the report of each step that is read, such as a :class:`distclip.Recorder`.
    """

    def __init__(self, clipper: Clipper, on_step: Callable[[Report], Any] | None = None):
        self.clipper, self.on_step = clipper, on_step
        self.step, self.clipped, self.bad, self.norm = 0, 0, 0, 0.0

    def read(self) -> None:
        """Read the last step if it is new, and raise if too many steps in a row were skipped."""
        state = self.clipper.state
        if state["step"].item() == self.step:
            return
        self.step, self.clipped, self.bad = (state[name].item() for name in ("step", "clipped", "bad"))
        report = self.clipper.report(dict(state["report"]))  # the compiled step puts the next one into that dictionary
        self.norm = float(report.norm.item())  # type: ignore[arg-type]
        if report.skipped.item() or not report.finite.item():
            limit = f", above {report.skip_above.item():.4g}" if report.finite.item() else ""
            done = BAD.get(self.clipper.nonfinite, "refused")
            say(f"the norm of step {self.step} is {self.norm}{limit}; the step was {done}")
        if self.on_step is not None:
            self.on_step(report)
        self.clipper.settle()

    @property
    def share(self) -> float:
        """Of the steps that were clipped."""
        return self.clipped / max(self.step, 1)

    def totals(self) -> str:
        return totals(self.step, self.clipped, self.bad, self.norm, self.clipper.nonfinite)


def totals(step: int, clipped: int, bad: int, norm: float, nonfinite: str) -> str:
    kind = "skipped" if nonfinite == "skip" else "not finite"
    return f"{clipped / max(step, 1):.0%} clipped, {bad} {kind}, last norm {norm:.4g}"


def say(what: str) -> None:
    """Print a line, on rank 0."""
    if init().rank == 0:
        print(f"distclip: {what}", flush=True)
