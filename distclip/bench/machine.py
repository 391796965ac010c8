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
from distclip.engine.kernels import engine
from distclip.engine.native import load


def describe(libraries: dict[str, str], world: distclip.World) -> dict[str, Any]:
    """Processor, memory, versions and engine. ``libraries``: the versions of what distclip is compared with."""
    kernel = load() if engine() == "native" else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "distclip": version("distclip"),
        "mlx": version("mlx"),
        "numpy": version("numpy"),
        **libraries,
        "device": str(mx.default_device()),
        "engine": engine(),
        "instructions": kernel.instructions if kernel else None,
        "threads": kernel.threads if kernel else 1,
        "ranks": world.size,
        "backend": world.backend,
    }


def processor() -> str:
    if sys.platform == "darwin":
        sysctl = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
        return sysctl.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that are available now; half of all memory where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total_memory() // 2
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), total_memory() // 2)
