"""What a :class:`distclip.Clipper` did in a step: arrays that force nothing until they are asked for numbers."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from distclip import noise


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
        noise_scale (mlx.core.array): the gradient noise scale in rows of a batch, float32, shape (), where asked for.
        names (list of str): of the groups.
    """

    norm: mx.array
    threshold: mx.array
    scale: mx.array
    finite: mx.array
    clipped: mx.array
    skipped: mx.array
    step: mx.array
    group_norms: mx.array
    rank_norms: mx.array
    noise_scale: mx.array

    def __init__(self, arrays: dict[str, mx.array], names: list[str], hosts: list[str], told: set[int]) -> None:
        self.arrays, self.names, self._hosts, self._told = arrays, names, hosts, told

    def __getattr__(self, name: str) -> mx.array:
        arrays: dict[str, mx.array] = self.__dict__.get("arrays", {})  # none yet while it is copied
        if name not in arrays:
            raise AttributeError(f"This report has no '{name}'; it has {', '.join(arrays)}")
        return arrays[name]

    def to_dict(self) -> dict[str, Any]:
        """All of it as Python numbers. Evaluates, and is the only thing of a report that does.

        Warns when one rank's norm was far above the others' for many steps, naming rank and host.
        """
        mx.eval(self.arrays)
        found: dict[str, Any] = {name: array.tolist() for name, array in self.arrays.items()}
        per_group = self.arrays["threshold"].ndim > 0
        for name in ("threshold", "scale") if per_group else ():
            found[name] = dict(zip(self.names, found[name], strict=True))
        if "group_norms" in found:
            found["groups"] = dict(zip(self.names, found.pop("group_norms"), strict=True))
        far = found.pop("far", [])
        if far:
            found["rank_hosts"] = self._hosts
        for rank, steps in enumerate(far):
            if steps < noise.FAR_STEPS:
                self._told.discard(rank)
            elif rank not in self._told:
                self._told.add(rank)
                warnings.warn(
                    f"The gradient norm of rank {rank} on {self._hosts[rank]} has been more than {noise.FAR:g} times "
                    f"the ranks' median for {steps} steps: look at its data, and at its memory.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return found
