"""A CPU stream that plays a device, for tests where there is no GPU: distclip works as it would on one."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import pytest

from distclip.engine import streams

real_device_of = streams.device_of
emulations = ExitStack()  # open until the process ends


def play_device(monkeypatch: pytest.MonkeyPatch) -> mx.Stream:
    """A stream that distclip takes for that of a device, until the test ends."""
    stream = mx.new_stream(mx.cpu)

    before = streams.device_of

    def device_of(given: streams.Stream) -> Any:
        return "a device" if isinstance(given, mx.Stream) and given == stream else before(given)

    monkeypatch.setattr(streams, "device_of", device_of)
    return stream


def play_default_device(engine: str) -> None:
    """From now on the default device is taken for one that is not the CPU.

    Args:
        engine: ``"gpu"``: the kernels run, emulated. ``"mlx"``: MLX operations work.
    """
    streams.device_of = lambda stream: "a device" if stream is None else real_device_of(stream)
    if engine == "gpu":
        from engine import emulation

        emulations.enter_context(emulation.emulated())
