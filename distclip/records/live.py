"""Show the run in a line of rank 0's standard output."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from distclip.records.read import NAMES, was_clipped


class Live:
    """Shows each step: on a terminal a line that changes, else a line every ``every`` steps.

    Args:
        steps: the last step of the run, for a bar in front of the line on a terminal.
    """

    def __init__(self, every: int, steps: int | None = None):
        self.every, self.steps, self.terminal = every, steps, on_terminal()
        self.seen, self.clipped, self.skipped, self.shown_at = 0, 0, 0, 0.0
        self.values: dict[str, float] = {}
        self.text = ""

    def show(self, step: dict[str, Any]) -> None:
        self.seen += 1
        self.clipped += was_clipped(step)
        self.skipped += bool(step.get("skipped"))
        self.values |= {name: value for name, value in step.items() if name not in NAMES and name != "step"}
        self.text = self._text(step)
        if self.terminal and time.monotonic() - self.shown_at > 0.1:  # more often than the eye can follow is slow
            self._print("")
        elif not self.terminal and (self.seen - 1) % self.every == 0:
            print(self.text, flush=True)

    def end(self) -> None:
        if self.terminal and self.seen:
            self._print("\n")
        elif self.seen and (self.seen - 1) % self.every:
            print(self.text, flush=True)

    def _text(self, step: dict[str, Any]) -> str:
        values = self.values | {"norm": step["norm"], "threshold": step.get("threshold")}
        bar = f"{_bar(step['step'] / self.steps)} " if self.steps and self.terminal else ""
        parts = [f"{bar}step {step['step']}" + (f"/{self.steps}" if self.steps else "")]
        parts += [f"{name} {_number(value)}" for name, value in values.items() if isinstance(value, (int, float))]
        parts += [f"clipped {self.clipped / self.seen:.0%}", f"skipped {self.skipped}"]
        parts += [f"{step['step_s'] * 1e3:.3g} ms"] if "step_s" in step else []
        return "  ".join(parts)

    def _print(self, end: str) -> None:
        self.shown_at = time.monotonic()
        width = os.get_terminal_size().columns or 80
        print(f"\r{self.text[: width - 1]}\x1b[K", end=end, flush=True)


def _bar(share: float) -> str:
    """
    >>> _bar(0.4)
    '[####      ]'
    """
    return f"[{'#' * min(int(10 * share), 10):<10}]"


def _number(value: float) -> str:
    """
    >>> _number(0.123456), _number(23456.7), _number(1e12)
    ('0.1235', '23,457', '1e+12')
    """
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def on_terminal() -> bool:
    """Whether a person looks on: mpirun gives every rank a terminal of no size, and local.sh says what is behind."""
    return sys.stdout.isatty() and (os.get_terminal_size().columns > 0 or os.environ.get("DISTCLIP_TERMINAL") == "1")
