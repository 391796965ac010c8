"""A CPU stream that plays a device, for tests where there is no GPU: distclip works as it would on one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import pytest

from distclip.engine import streams

real_device_of = streams.device_of
emulations = ExitStack()  # open until the process ends


def played() -> str:
    """What the CPU plays in this process: ``"gpu"``, ``"mlx"``, ``"stream"``, or nothing."""
    return os.environ.get("PLAY_DEVICE", "")


def play_device(monkeypatch: pytest.MonkeyPatch) -> mx.Stream:
    """A stream that distclip takes for that of a device, until the test ends."""
    stream = mx.new_stream(mx.cpu)

    before = streams.device_of

    def device_of(given: streams.Stream) -> Any:
        return "a device" if isinstance(given, mx.Stream) and given == stream else before(given)

    monkeypatch.setattr(streams, "device_of", device_of)
    return stream


def play_default_stream(communication: mx.Stream) -> None:
    """From now on a CPU stream of its own is the default: what runs there would wait for the collectives, as a device
    does."""
    pin_collectives(communication, setattr)
    mx.set_default_stream(mx.new_stream(mx.cpu))


def pin_collectives(communication: mx.Stream, set_: Callable[..., None]) -> None:
    """Run collectives that name no stream on one stream, as those of a model do where the default device is a GPU.

    Args:
        set_: of an object an attribute to a value.
    """
    for name in ("all_sum", "all_max", "all_min", "all_gather", "send", "recv", "recv_like"):
        collective = getattr(mx.distributed, name)

        def pinned(*arguments: Any, collective: Any = collective, stream: Any = None, **keywords: Any) -> Any:
            on_cpu = stream is None or stream == mx.cpu  # the stream of the CPU, which the played device is not
            return collective(*arguments, stream=communication if on_cpu else stream, **keywords)

        set_(mx.distributed, name, pinned)


def play_default_device(engine: str) -> None:
    """From now on the default device is taken for one that is not the CPU.

    Args:
        engine: ``"gpu"``: the kernels run, emulated. ``"mlx"``: MLX operations work.
    """
    streams.device_of = lambda stream: "a device" if stream is None else real_device_of(stream)
    if engine == "gpu":
        from engine import emulation

        emulations.enter_context(emulation.emulated())
