"""What a :class:`distclip.Clipper` did in a step: lazy arrays, until they are asked for numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip.engine.streams import is_tracing


class Report:
    """The outcome of one step, the same on every rank.

    Attributes:
        arrays (dict): all arrays by name, for a compiled function to return; ``clipper.report(arrays)`` makes a report
            of them again.
        norm (mlx.core.array): the global norm before clipping, without the loss scale, float32, shape ().
        threshold, scale (mlx.core.array): float32, shape (), or (groups,) for a threshold per group.
        finite, clipped, skipped (mlx.core.array): bool, shape ().
        skip_above, spike (mlx.core.array): the norm above which this step is skipped, float32, shape (), and whether it
            was, though finite, bool, shape (), where ``skip_above`` is given.
        step (mlx.core.array): how many steps the clipper has seen with this one, int32, shape ().
        group_norms (mlx.core.array): float32, shape (groups,), in the order of ``names``, where groups were asked for.
        rank_norms (mlx.core.array): the ranks' norms before averaging, float32, shape (ranks,), where asked for.
        loss_scale (mlx.core.array): what was divided out, float32, shape (), where the loss was scaled.
        noise_scale (mlx.core.array): the gradient noise scale in rows of a batch, float32, shape (), where asked for.
        names (list of str): of the groups.
    """

    def __init__(self, arrays: dict[str, mx.array], names: list[str], hosts: list[str]) -> None:
        self.arrays: dict[str, mx.array] = arrays
        self.names: list[str] = names
        self._hosts = hosts
        self._traced = is_tracing()

    def __repr__(self) -> str:
        return f"Report({', '.join(self.arrays)})"  # without values, which would have to be evaluated

    def __getattr__(self, name: str) -> mx.array:
        arrays: dict[str, mx.array] = self.__dict__.get("arrays", {})  # none yet while it is copied
        if name not in arrays:
            raise AttributeError(f"This report has no '{name}'; it has {', '.join(arrays)}")
        self._check_has_values()
        return arrays[name]

    def to_dict(self) -> dict[str, Any]:
        """All of it as Python numbers. Evaluates, and is the only thing of a report that does."""
        self._check_has_values()
        mx.eval(self.arrays)
        numbers: dict[str, Any] = {name: array.tolist() for name, array in self.arrays.items()}
        per_group = self.arrays["threshold"].ndim > 0
        for name in ("threshold", "scale") if per_group else ():
            numbers[name] = dict(zip(self.names, numbers[name], strict=True))
        if "group_norms" in numbers:
            numbers["groups"] = dict(zip(self.names, numbers.pop("group_norms"), strict=True))
        if "noise_scale" in numbers:
            numbers["rank_hosts"] = self._hosts
        return numbers

    def _check_has_values(self) -> None:
        if self._traced and not is_tracing():
            raise RuntimeError(
                "This report was made inside a function that mx.compile traced, so its arrays have no values outside. "
                "Return report.arrays from the function and make a report of them, clipper.report(arrays), or read "
                "clipper.state['norm'] of the last step."
            )
