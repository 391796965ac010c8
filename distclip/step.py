"""One step of a :class:`distclip.Clipper`: everything that is measured, in one collective, and then the scaling."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from distclip.average import BUCKET_BYTES, Average
from distclip.engine import kernels
from distclip.engine.operations import Stream
from distclip.layout import Layout, Placement, communicates, copies, placements
from distclip.norm import added, measure, slots
from distclip.tree import arrays, rebuild


class Step:
    """The gradients of a step, on their way.

    Args:
        grads: tree of arrays; partial over ``average`` if that is a group, sharded or replicated as ``layout`` says.
        group: the ranks that hold the gradient together.
        member: for every leaf the number of its group of leaves; None for one group of all leaves.
        groups: how many groups of leaves there are.
        own: whether the ranks' own norms before averaging are wanted.
    """

    def __init__(
        self,
        grads: Any,
        layout: Layout,
        group: mx.distributed.Group,
        average: mx.distributed.Group | None,
        norm_type: float,
        member: list[int] | None,
        groups: int,
        own: bool,
        stream: Stream,
    ) -> None:
        self.grads, self._layout, self._group = grads, layout, group
        self._norm_type, self._member, self._groups, self._stream = norm_type, member, groups, stream
        self._leaves = arrays(grads)
        self._placed = placements(grads, layout, len(self._leaves))
        self.agreed = group if group.size() > 1 and communicates(layout, self._placed) else None
        self.over = average if average is not None and average.size() > 1 else None
        self._own = self._measured_by_rank(average) if own and average is not None else None
        self._average: Average | None = None
        if average is not None:
            self._average = Average(grads, self._placed, average, norm_type, None, BUCKET_BYTES, stream)
            # The kernel measures sums as they arrive, all together: by groups they are measured once they are there.
            if member is not None or norm_type not in (1, 2):
                self._leaves = self._average.scaled(mx.array(1.0))
                self.grads, self._average = rebuild(grads, self._leaves), None

    def norms(self) -> tuple[mx.array, mx.array, mx.array | None]:
        """The global norm and the groups' norms, float32, shape (1 + groups,); whether all is finite, bool, shape ();
        and the ranks' own norms, float32, shape (ranks,). One collective, or none."""
        if self._norm_type not in (1, 2):
            norm, finite, _ = measure(self.grads, self._layout, self._group, self._norm_type, self._stream)
            return mx.stack([norm, norm], stream=mx.cpu), finite, None
        sums = self._sums()
        with mx.stream(mx.cpu):
            powers, bad = sums[:, 0], mx.sum(sums[:, 1])
            own = self._own
            if self.agreed is not None:
                parts = [powers, bad[None]] + ([] if own is None else [own])
                together = mx.distributed.all_sum(mx.concatenate(parts), group=self.agreed, stream=mx.cpu)
                powers, bad, own = together[: self._groups], together[self._groups], together[self._groups + 1 :]
            elif own is not None and self.over is not None:
                own = mx.distributed.all_sum(own, group=self.over, stream=mx.cpu)
            powers = mx.concatenate([mx.sum(powers)[None], powers])
            norms = mx.sqrt(powers) if self._norm_type == 2 else powers
            if self._average is not None:
                norms = norms * mx.array(self._average.after, mx.float64)
            norms = norms.astype(mx.float32)
            finite = mx.logical_and(bad == 0, mx.isfinite(norms[0]))
            return norms, finite, None if self._own is None or own is None else mx.sqrt(own).astype(mx.float32)

    def scaled(self, scale: mx.array, finite: mx.array | None) -> Any:
        """The tree times the scale, float32, shape () or (groups,); zeros where ``finite`` is given and False."""
        if self._average is not None:
            return rebuild(self.grads, self._average.scaled(scale, finite))
        if scale.ndim == 0 or self._member is None:
            return rebuild(self.grads, kernels.scale(self._leaves, scale.reshape(()), finite, self._stream))
        results = list(self._leaves)
        for number in range(self._groups):
            places = [i for i, of in enumerate(self._member) if of == number]
            done = kernels.scale([self._leaves[i] for i in places], scale[number], finite, self._stream)
            for i, leaf in zip(places, done, strict=True):
                results[i] = leaf
        return rebuild(self.grads, results)

    def _sums(self) -> mx.array:
        """The sums of powers that this rank adds, and the counts of what is not finite: float64, shape (groups, 2)."""
        if self._average is not None:
            return self._average.sums(self.agreed)[None]
        local = kernels.sum_squares if self._norm_type == 2 else kernels.sum_abs
        known: dict[Placement, float] = {}
        batches: list[dict[float, list[mx.array]]] = [{} for _ in range(self._groups)]
        members = self._member if self._member is not None else [0] * len(self._leaves)
        for leaf, placement, number in zip(self._leaves, self._placed, members, strict=True):
            if placement not in known:
                known[placement] = 1.0 if self.agreed is None else 1.0 / copies(placement, self.agreed)
            batches[number].setdefault(known[placement], []).append(leaf)
        rows = [added([(weight, local(leaves, self._stream)) for weight, leaves in batch.items()]) for batch in batches]
        return mx.stack(rows, stream=mx.cpu)

    def _measured_by_rank(self, over: mx.distributed.Group) -> mx.array:
        """This rank's part of the squared norms of all ranks' own gradients, in a slot for each: float64, (ranks,)."""
        shared: dict[Placement, list[mx.array]] = {}
        for leaf, placement in zip(self._leaves, self._placed, strict=True):
            shared.setdefault(placement, []).append(leaf)
        # Of the copies in the world, those along the averaged axis are other gradients.
        total = added(
            [
                (1.0 if self.agreed is None else over.size() / copies(placement, self.agreed), measured)
                for placement, measured in ((p, kernels.sum_squares(x, self._stream)) for p, x in shared.items())
            ]
        )
        with mx.stream(mx.cpu):
            return slots(total[0], over)
