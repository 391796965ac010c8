"""What is evaluated when: no device waits for the network.

On macOS a GPU whose work waits for about 5 s is killed, and the process with it. So what the ranks of a group agree on
is on the host before a device is given anything that needs it. A step that runs on the stream of the collectives, or
on one rank, stays lazy.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from distclip.arguments import callers_level
from distclip.engine import kernels
from distclip.engine.streams import Stream, is_tracing, resolved, to_device, working_on
from distclip.world import init


@dataclass(frozen=True)
class Schedule:
    """How what a group agrees on reaches the stream that works on the leaves.

    Attributes:
        waits: whether the host waits for it. Else it crosses lazily.
        stream: of the leaves.
    """

    waits: bool
    stream: Stream

    def wait(self, values: list[mx.array]) -> None:
        """Wait on the host for arrays that come from the network, where a device would wait otherwise."""
        if self.waits:
            mx.eval(values)

    def bring(self, values: list[mx.array]) -> list[mx.array]:
        """Float32 and bool arrays that come from the network, for the stream to use."""
        self.wait(values)
        return values if self.waits else to_device(values, self.stream)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Where to compute with what was brought: on the host where it waited, which then has the results at once."""
        return working_on(init().stream if self.waits else self.stream)

    def scale(self, leaves: list[mx.array], factor: mx.array, finite: mx.array | None = None) -> list[mx.array]:
        """As :func:`distclip.engine.kernels.scale`; the leaves themselves where the host knows that the factor is 1."""
        if not self.waits:
            return kernels.scale(leaves, factor, finite, self.stream)
        with self.arithmetic():
            whole = mx.all(factor == 1).item()
        if finite is not None and finite.item():
            finite = None
        if not whole or finite is not None:
            return kernels.scale(leaves, factor, finite, self.stream)
        kept = [mx.issubdtype(leaf.dtype, mx.inexact) for leaf in leaves]
        return [x if same else x.astype(mx.float32, stream=self.stream) for x, same in zip(leaves, kept, strict=True)]


def schedule_of(group: mx.distributed.Group | None, stream: Stream) -> Schedule:
    """The schedule of work on leaves; lazy while MLX traces.

    Args:
        group: the ranks that agree on something; None if nothing is sent.
        stream: of the work on the leaves.
    """
    apart = group is not None and is_apart(group, stream)
    if apart and is_tracing():
        _warn_once()
        return Schedule(False, stream)
    return Schedule(apart, stream)


def is_apart(group: mx.distributed.Group, stream: Stream) -> bool:
    """Whether work on a stream would wait there for other ranks, since the collectives run on another."""
    return group.size() > 1 and resolved(stream) != init().stream


@cache
def _warn_once() -> None:
    warnings.warn(
        "A GPU waits for the other ranks in this step, since it is traced (mx.compile, mx.grad), and macOS kills a GPU "
        "that waits for 5 s. Compile the loss and its gradient alone, and clip, average and update outside; or call "
        "distclip.init().barrier() before each step, so that no rank is late.",
        RuntimeWarning,
        stacklevel=callers_level(),
    )
