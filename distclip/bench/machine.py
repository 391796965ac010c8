"""The machine that the bench runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import distclip
from distclip.engine.kernels import engine, native_kernel


def describe(libraries: dict[str, str], world: distclip.World) -> dict[str, Any]:
    """Processor, memory, versions and engine. ``libraries``: the versions of what distclip is compared with."""
    kernel = native_kernel(None)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("distclip", "mlx", "numpy")},
        **libraries,
        "device": str(mx.default_device()),
        "gpu": mx.device_info(mx.gpu) if mx.is_available(mx.gpu) else None,
        "engine": engine(),
        "instructions": kernel.instructions if kernel else None,
        "threads": threads(),
        "ranks": world.size,
        "backend": world.backend,
    }


def threads() -> int:
    """The number of distclip's threads."""
    kernel = native_kernel(None)
    return kernel.threads if kernel else 1


def processor() -> str:
    if sys.platform == "darwin":
        sysctl = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
        return sysctl.stdout.strip() or platform.machine()
    return _read("/proc/cpuinfo", "model name") or platform.machine()


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that are available now; half of all memory where the system does not say."""
    available = _read("/proc/meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 if available else total_memory() // 2


def _read(path: str, name: str) -> str:
    """The value of the first line "name: value" of a file; empty without such a line or file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
