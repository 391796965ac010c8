"""distclip's engines that can work on the machine at hand, as contestants beside the other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from distclip.bench.timing import Contestant, Fresh, Function, work_of
from distclip.engine import gpu, kernels, native
from distclip.engine.streams import Stream

VARIABLE = "DISTCLIP_ENGINE"
READ_ONCE = (native.load, gpu.load, gpu.problem)  # they read the variable once a process


@dataclass(frozen=True)
class Engine:
    """An engine, and how to make it work."""

    name: str  # "native", "gpu" or "mlx", as kernels.engine() says
    stream: Stream = None
    variable: str | None = None  # the value of DISTCLIP_ENGINE; None: as it is
    label: str = ""

    def __str__(self) -> str:
        return f"distclip ({self.label or self.name})"

    def contestant(self, function: Function, fresh: Fresh, given_up: bool = True) -> Contestant:
        return Contestant(str(self), fresh, work_of(function, given_up), mlx=True, around=self.selected)

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Within it distclip works by this engine."""
        if self.variable is None:
            yield
            return
        before = os.environ.get(VARIABLE)
        try:
            _set(self.variable)
            yield
        finally:
            _set(before)


def available() -> list[Engine]:
    """The engines that can work here; first the one that works on the default device by itself."""
    engines = [Engine(kernels.engine())]
    if engines[0].name != "mlx":
        engines.append(Engine("mlx", variable="mlx"))
    if engines[0].name != "native" and kernels.engine(mx.cpu) == "native":
        engines.append(Engine("native", mx.cpu, label="native, stream=mx.cpu"))
    return engines


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value
    for function in READ_ONCE:
        function.cache_clear()
    kernels.engine()  # loads what it needs before a time is taken
