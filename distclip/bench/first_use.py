"""Time the first use of distclip's passes in a process, when kernels are compiled.

As a program, in a process of its own: ``python -m distclip.bench.first_use gpu``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from distclip.engine import gpu, kernels

DTYPES = ("float32", "bfloat16", "float16")
SIZE = 1 << 16
LIMIT_S = 300


Longer = dict[str, float | str]


def measure(device: mx.Stream) -> Longer:
    """By how many seconds the first use takes longer than the second, or why it fails.

    "load" is that of the engine, which checks itself: on a GPU it compiles what the uses before it did not.
    """
    longer: Longer = {}
    passes: Any = gpu if gpu.source.backend() and device.device == gpu.source.device() else kernels
    with mx.stream(device):
        leaves = {dtype: [mx.full((SIZE,), 1.0, getattr(mx, dtype))] for dtype in DTYPES}
        mx.eval([leaf * 2 for alike in leaves.values() for leaf in alike])  # MLX starts the device
        for dtype, alike in leaves.items():
            longer[f"norm, {dtype}"] = _longer(partial(passes.sum_squares, alike))
            longer[f"scale, {dtype}"] = _longer(partial(passes.scale, alike, mx.array(0.5)))
        longer["load"] = _longer(kernels.engine)
    return longer


def _longer(function: Callable[[], Any]) -> float | str:
    try:
        return _seconds(function) - _seconds(function)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    mx.eval(function())
    mx.synchronize()
    return time.perf_counter() - begin


def measure_in_child(device: mx.Stream) -> Longer | str:
    """The same in another process, or why there is no result."""
    name = "gpu" if device.device == mx.gpu else "cpu"
    try:
        ended = subprocess.run(
            [sys.executable, "-m", __name__, name], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {LIMIT_S} s"
    if ended.returncode != 0:
        return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    longer: Longer = json.loads(ended.stdout)
    return longer


if __name__ == "__main__":
    print(json.dumps(measure(mx.new_stream(getattr(mx, sys.argv[1])))))
