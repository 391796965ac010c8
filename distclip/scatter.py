"""``mx.distributed.sum_scatter`` for the backends where MLX has none: MPI and the ring.

On MPI the ranks exchange blocks in pairs, by all-gathers of two ranks: a rank sends there while it receives. By MLX's
send and recv it would do one after the other, since each of them blocks until the other rank meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from distclip.engine.streams import working_on

EXCHANGE_FROM_BYTES = 2**15  # of a block; smaller ones take no longer in an all-sum, which has fewer messages


class Pair(NamedTuple):
    """Two ranks that exchange blocks in a round. A rank that pauses in a round is its own partner."""

    partner: int
    group: mx.distributed.Group


class SumScatter:
    """Sum an array over the ranks of a group, and keep this rank's block of the sum.

    Args:
        world: the group of all ranks, which is also the default group.
        stream: gives the stream to communicate on where a call names none.
        in_pairs: whether the backend splits groups, so that blocks can be exchanged in pairs.
    """

    def __init__(self, world: mx.distributed.Group, stream: Callable[[], mx.Stream], in_pairs: bool):
        self._world, self._stream, self._in_pairs = world, stream, in_pairs
        self._members: dict[mx.distributed.Group, tuple[int, ...]] = {}
        self._pairs: dict[tuple[int, ...], list[Pair]] = {}  # MLX makes a group object for each call that names none

    def __call__(
        self, x: mx.array, *, group: mx.distributed.Group | None = None, stream: mx.Stream | mx.Device | None = None
    ) -> mx.array:
        """This rank's block of the sum. Collective. Lazy, but the first call for a group splits it, which meets the
        other ranks.

        Args:
            x: shape (N rows, ...), with the same shape and dtype on each of the N ranks of the group.

        Returns:
            Shape (rows, ...), with the dtype of ``x``. Ranks add in a fixed order, in that dtype.

        Raises:
            ValueError: the ranks do not divide axis 0.
        """
        group = self._world if group is None else group
        n, rank = group.size(), group.rank()
        if n == 1:
            return x
        if x.ndim == 0 or x.shape[0] % n != 0:
            raise ValueError(f"sum_scatter needs an axis 0 that {n} ranks divide, and was given the shape {x.shape}.")
        stream = self._stream() if stream is None else stream
        with working_on(stream):
            if self._in_pairs and x.nbytes >= n * EXCHANGE_FROM_BYTES:
                return _exchange(x, n, rank, self._pairs_of(group, stream), stream)
            return _blocks(mx.distributed.all_sum(x, group=group, stream=stream), n, rank)

    def _pairs_of(self, group: mx.distributed.Group, stream: mx.Stream | mx.Device) -> list[Pair]:
        if group not in self._members:
            # Its value is there once all that communicates before it has ended: MPI is not called from two threads.
            ranks: Any = mx.distributed.all_gather(mx.array([self._world.rank()]), group=group, stream=stream).tolist()
            self._members[group] = tuple(ranks)
        members = self._members[group]
        if members not in self._pairs:
            rank = group.rank()
            partners = partners_of(rank, len(members))
            self._pairs[members] = [Pair(other, group.split(min(rank, other), rank)) for other in partners]
        return self._pairs[members]


def partners_of(rank: int, n: int) -> list[int]:
    """The rank that a rank exchanges with in each round, so that every two of n ranks meet once.

    With an odd n each rank pauses in one round: it is its own partner there.
    """
    rounds = n - 1 + n % 2
    if rank == rounds:  # the last of an even n meets in each round the rank that would pause
        return [k * (rounds + 1) // 2 % rounds for k in range(rounds)]
    others = ((k - rank) % rounds for k in range(rounds))
    return [other if other != rank or n % 2 else rounds for other in others]


def _exchange(x: mx.array, n: int, rank: int, pairs: list[Pair], stream: mx.Stream | mx.Device) -> mx.array:
    """The sum of this rank's block over n ranks: each round adds the block of a partner.

    Every rank makes the same operations, or MLX would evaluate those of several sums in an order that differs between
    ranks, which hangs. So a rank that pauses takes its own block by as many operations as the others take one.
    """
    total = None if n % 2 else _blocks(x, n, rank)
    for partner, group in pairs:
        pauses = partner == rank
        first = min(rank, n - 2) if pauses else partner
        sent = _blocks(x, n, first, 2 if pauses else 1)
        both = mx.contiguous(sent) if pauses else mx.distributed.all_gather(sent, group=group, stream=stream)
        received = _blocks(both, 2, rank - first if pauses else int(partner > rank))
        total = received if total is None else total + received
    assert total is not None
    return total


def _blocks(x: mx.array, n: int, first: int, count: int = 1) -> mx.array:
    """Some of the n blocks into which axis 0 is cut."""
    rows = x.shape[0] // n
    return x[first * rows : (first + count) * rows]
