"""One step of a :class:`distclip.Clipper`: everything that is measured, in one collective, and then the scaling."""

from __future__ import annotations

import mlx.core as mx

from distclip.average import Average, check_weight
from distclip.complete import completed
from distclip.engine import kernels
from distclip.engine.streams import Stream
from distclip.layout import Placed
from distclip.norm import norm_of, root, slots, total
from distclip.schedule import schedule_of
from distclip.world import all_sum


class Step:
    """The gradients of a step, on their way.

    Args:
        placed: the leaves; partial over ``average`` if that is a group, sharded or replicated otherwise.
        average: the ranks to average over; None if the gradients are not partial.
        members: the group of leaves that each leaf is in, int32, shape (leaves,); None for one group of all leaves.
        groups: how many groups of leaves there are.
        rank_norms: whether the ranks' own norms before averaging are wanted.
        weight: of this rank in the average, as in :func:`distclip.average_gradients`.
        communication_dtype, bucket_bytes: of the average, as in :func:`distclip.average_gradients`.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        average: mx.distributed.Group | None,
        norm_type: float,
        members: mx.array | None,
        groups: int,
        rank_norms: bool,
        weight: float | mx.array | None,
        communication_dtype: mx.Dtype | None,
        bucket_bytes: int,
        stream: Stream,
    ) -> None:
        check_weight(weight)
        if weight is not None and average is None:
            raise ValueError("weight says how much a rank counts in the average: make the Clipper with average=True")
        if average is None or average.size() == 1 or rank_norms:
            placed = completed(placed, stream)
        self._placed, self._arrays = placed, placed.leaves.arrays
        self._norm_type, self._members, self._groups, self._stream = norm_type, members, groups, stream
        self._over = average if average is not None and average.size() > 1 else None
        self._rank_squares = self._measure_ranks(average) if rank_norms and average is not None else None
        over = self._over
        self._average = None
        if over is not None:
            self._average = Average(
                placed,
                over,
                norm_type=norm_type,
                weight=weight,
                communication_dtype=communication_dtype,
                bucket_bytes=bucket_bytes,
                stream=stream,
            )
        self.schedule = schedule_of(self._over or placed.agreed, stream)

    def norms(self) -> tuple[mx.array, mx.array, mx.array | None]:
        """Measure, by one collective or none.

        Returns:
            The global norm and the groups' norms, float32, shape (1 + groups,); whether all is finite, bool, shape ();
            and the ranks' own norms, float32, shape (ranks,), if wanted.
        """
        if self._norm_type not in (1, 2):
            ours = self._average
            norm, finite = ours.norm() if ours else norm_of(self._arrays, self._placed, self._norm_type, self._stream)
            norms, finite = self.schedule.bring([mx.stack([norm, norm], stream=mx.cpu), finite])
            return norms, finite, None
        with mx.stream(mx.cpu):
            mine = self._mine()
            if self._placed.agreed is not None:
                mine = all_sum(mine, self._placed.agreed)
            powers, bad, squares = mine[: self._groups], mine[self._groups], mine[self._groups + 1 :]
            norms = root(mx.concatenate([mx.sum(powers)[None], powers]), self._norm_type).astype(mx.float32)
            measured = [norms, mx.logical_and(bad == 0, mx.isfinite(norms[0]))]
            if self._rank_squares is not None:
                if self._placed.agreed is None and self._over is not None:
                    squares = all_sum(squares, self._over)
                measured.append(mx.sqrt(squares).astype(mx.float32))
        norms, finite, *rank_norms = self.schedule.bring(measured)
        return norms, finite, rank_norms[0] if rank_norms else None

    def scaled(self, scale: mx.array, finite: mx.array | None, *, widen: bool = False) -> list[mx.array]:
        """The leaves times the scale, float32, shape () or (groups,); zeros where ``finite`` is given and False. With
        ``widen`` float16 leaves become float32 first, since a small scale would make their values vanish."""
        if scale.ndim == 1:
            with self.schedule.arithmetic():
                scale = mx.take(scale, mx.array(0) if self._members is None else self._members)
        if widen and any(x.dtype == mx.float16 for x in self._arrays):
            arrays = self._arrays if self._average is None else self._average.scaled(mx.array(1.0))
            wide = [x.astype(mx.float32, stream=self._stream) if x.dtype == mx.float16 else x for x in arrays]
            return self.schedule.scale(wide, scale, finite)
        if self._average is not None:
            return self._average.scaled(scale, finite)
        return self.schedule.scale(self._arrays, scale, finite)

    def _mine(self) -> mx.array:
        """What this rank adds to the collective, float64: the groups' sums of powers, the count of what is not finite,
        and this rank's part of the ranks' squared norms."""
        ours = self._average
        sums = ours.measured if ours else kernels.sums_of(self._arrays, self._norm_type, self._stream)
        mine = total(sums, self._placed.share, self._members, self._groups)
        return mine if self._rank_squares is None else mx.concatenate([mine, self._rank_squares])

    def _measure_ranks(self, over: mx.distributed.Group) -> mx.array:
        """This rank's part of the squared norms of all ranks' own gradients, in a slot for each: float64, (ranks,)."""
        squares = total(kernels.sum_squares(self._arrays, self._stream), self._placed.share)[0]
        with mx.stream(mx.cpu):
            # Of the copies of a block, those along the averaged axis are other gradients.
            return slots(squares if self._placed.agreed is None else squares * over.size(), over)
