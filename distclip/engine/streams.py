"""Where work is done: on the CPU, or on a device, which has launches, copies and waits of its own to save."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import mlx.core as mx

from distclip.engine import MLX_VERSIONS, mlx_package

if not hasattr(mx, "ThreadLocalStream"):
    oldest, package = ".".join(map(str, MLX_VERSIONS[0])), mlx_package(platform.system())
    raise ImportError(
        f"distclip needs mlx {oldest} or later, and mlx {version('mlx')} is installed: pip install '{package}'"
    )
Stream = mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None


def device_of(stream: Stream) -> Any:
    return mx.default_device() if stream is None else getattr(stream, "device", stream)


def is_device(stream: Stream) -> bool:
    """Whether a stream is of a device, not of the CPU."""
    return bool(device_of(stream) != mx.cpu)


def stream_of(leaf: mx.array, stream: Stream) -> Stream:
    """Where to work on a leaf: on the stream asked for, but float64 only exists on the CPU."""
    return mx.cpu if leaf.dtype == mx.float64 else stream


def resolved(stream: Stream) -> mx.Stream | mx.ThreadLocalStream:
    """The stream that operations run on which are given this one."""
    if isinstance(stream, (mx.Stream, mx.ThreadLocalStream)):
        return stream
    return mx.default_stream(mx.default_device() if stream is None else stream)


def working_on(stream: Stream) -> AbstractContextManager[Any]:
    """A context in which operations that name no stream run on this one."""
    return nullcontext() if stream is None else mx.stream(stream)


def to_device(values: list[mx.array], stream: Stream) -> list[mx.array]:
    """Float32 and bool arrays that the CPU makes, for a stream to use.

    To a device they cross together, by one copy: it waits for each operation of its own that reads what the CPU makes.
    """
    if not is_device(stream):
        return values
    if len(values) == 1:
        return [mx.contiguous(values[0], stream=stream)]
    with mx.stream(mx.cpu):
        together = mx.concatenate([x.astype(mx.float32).reshape(-1) for x in values])
    (there,) = to_device([together], stream)
    with working_on(stream):
        parts = mx.split(there, list(accumulate(x.size for x in values[:-1])))
        return [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, values, strict=True)]


def start(arrays: list[mx.array], stream: Stream) -> None:
    """Start to compute arrays that a device makes and the CPU will read: the CPU waits for all of them, not for each.

    On a machine without a device, and while MLX traces, nothing is started.
    """
    if is_device(None) and not is_device(stream) and not is_traced(arrays):
        mx.async_eval(arrays)


_runs: Counter[str] = Counter()


def _count(arrays: list[mx.array]) -> list[mx.array]:
    _runs["probe"] += 1
    return arrays


_probe = mx.compile(_count, shapeless=True)


def is_traced(arrays: list[mx.array]) -> bool:
    """Whether an array belongs to a function that MLX traces (compile, grad, vmap), and has no value.

    Nothing is evaluated: a compiled function runs its Python code again only for such arrays.
    """
    _probe(arrays)  # may compile
    before = _runs["probe"]
    _probe(arrays)
    return _runs["probe"] != before


_tracers: list[mx.array] = []  # an input of a function that was traced


def is_tracing() -> bool:
    """Whether MLX traces a function (compile, grad, vmap) now: on all ranks alike, with and without leaves."""
    if not _tracers:
        mx.compile(_keep)(mx.zeros(()))
    # Where compiling is disabled the probe runs for every array.
    return is_traced(_tracers) and not is_traced([mx.zeros(())])


def _keep(array: mx.array) -> mx.array:
    _tracers.append(array)
    return array
