"""What a :class:`distclip.Clipper` did in a step: lazy arrays, until they are asked for numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Report:
    """The outcome of one step, the same on every rank.

    Attributes:
        arrays (dict): all arrays by name, for a compiled function to return; ``clipper.report(arrays)`` makes a report
            of them again.
        norm (mlx.core.array): the global norm before clipping, without the loss scale, float32, shape ().
        threshold, scale (mlx.core.array): float32, shape (), or (groups,) for a threshold per group.
        finite, clipped, skipped (mlx.core.array): bool, shape ().
        step (mlx.core.array): how many steps the clipper has seen with this one, int32, shape ().
        group_norms (mlx.core.array): float32, shape (groups,), in the order of ``names``, where groups were asked for.
        rank_norms (mlx.core.array): the ranks' norms before averaging, float32, shape (ranks,), where asked for.
        loss_scale (mlx.core.array): what was divided out, float32, shape (), where the loss was scaled.
        noise_scale (mlx.core.array): the gradient noise scale in rows of a batch, float32, shape (), where asked for.
        names (list of str): of the groups.
    """

    def __init__(self, arrays: dict[str, mx.array], names: list[str], hosts: list[str]) -> None:
        self.arrays, self.names, self._hosts = arrays, names, hosts

    def __getattr__(self, name: str) -> mx.array:
        arrays: dict[str, mx.array] = self.__dict__.get("arrays", {})  # none yet while it is copied
        if name not in arrays:
            raise AttributeError(f"This report has no '{name}'; it has {', '.join(arrays)}")
        return arrays[name]

    def to_dict(self) -> dict[str, Any]:
        """All of it as Python numbers. Evaluates, and is the only thing of a report that does."""
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
