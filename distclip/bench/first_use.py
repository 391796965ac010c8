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

from distclip.engine import kernels

DTYPES = ("float32", "bfloat16", "float16")
SIZE = 1 << 16
LIMIT_S = 300


def measure(device: mx.Stream) -> dict[str, float]:
    """Seconds that the first use takes longer than the second; "load": of the engine, with its check of itself."""
    longer: dict[str, float] = {}
    with mx.stream(device):
        leaves = {dtype: [mx.full((SIZE,), 1.0, getattr(mx, dtype))] for dtype in DTYPES}
        mx.eval([leaf * 2 for alike in leaves.values() for leaf in alike])  # MLX starts the device
        longer["load"] = _seconds(kernels.engine)
        for dtype, alike in leaves.items():
            for name, function in (
                ("norm", kernels.sum_squares),
                ("scale", partial(kernels.scale, factor=mx.array(0.5))),
            ):
                longer[f"{name}, {dtype}"] = _seconds(function, alike) - _seconds(function, alike)
    return longer


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    mx.eval(function(*args))
    mx.synchronize()
    return time.perf_counter() - begin


def measure_in_child(device: mx.Stream) -> dict[str, float] | str:
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
    seconds: dict[str, float] = json.loads(ended.stdout)
    return seconds


if __name__ == "__main__":
    print(json.dumps(measure(mx.new_stream(getattr(mx, sys.argv[1])))))
