"""Building the kernel while pip installs distclip: against the MLX that will run it, or not at all.

setuptools loads this file alone, so it imports nothing of distclip. A kernel that cannot be built (no compiler, no
headers) is left out: MLX operations serve then.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path("distclip/engine/native")  # pip builds in the project's root


class BuildKernel(build_ext):
    """Compile ``distclip/engine/native/*.cpp`` into a module named after MLX's version."""

    def finalize_options(self) -> None:
        try:
            self.distribution.ext_modules = [kernel()]
        except (ImportError, OSError) as error:
            if os.environ.get("DISTCLIP_ENGINE") == "native":
                raise
            print(f"distclip is installed without its native kernel: {error}", file=sys.stderr)
            self.distribution.ext_modules = []
        super().finalize_options()


def kernel() -> Extension:
    import nanobind

    mlx, version = find_mlx()
    source = Path(nanobind.source_dir())
    name = "mlx_" + re.sub(r"\W", "_", version)
    flags = [
        *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-unused-parameter"),
        *os.environ.get("DISTCLIP_CXXFLAGS", "").split(),
    ]
    beside = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    links = [f"-Wl,-rpath,{beside}/../../../mlx/lib", f"-Wl,-rpath,{mlx / 'lib'}"]
    if sys.platform == "darwin":
        flags.append("-mmacosx-version-min=14.0")  # as MLX itself
        links.append("-mmacosx-version-min=14.0")
    return Extension(
        f"distclip.engine.native.{name}",
        sources=sorted(str(path) for path in HERE.glob("*.cpp")),
        depends=sorted(str(path) for path in HERE.glob("*.h")),
        include_dirs=[
            *(nanobind.include_dir(), nanobind.source_dir()),
            *(str(source.parent / "ext/robin_map/include"), str(mlx / "include")),
        ],
        define_macros=[
            ("NB_DOMAIN", "mlx"),
            ("NDEBUG", None),
            ("NB_COMPACT_ASSERTIONS", None),
            ("DISTCLIP_MODULE", name),
        ],
        extra_compile_args=flags,
        extra_link_args=links,
        libraries=["mlx"],
        library_dirs=[str(mlx / "lib")],
        language="c++",
        optional=os.environ.get("DISTCLIP_ENGINE") != "native",
    )


def find_mlx() -> tuple[Path, str]:
    """The folder and version of MLX: of the environment that is installed into, or else of the build's own.

    pip builds in an isolated environment with the newest MLX, which may not be the one that is there.
    """
    for paths in ([sysconfig.get_path("platlib")], sys.path):
        spec = PathFinder.find_spec("mlx", paths)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / "include/mlx/version.h").exists():
                versions = [package.version for package in distributions(name="mlx", path=[str(Path(place).parent)])]
                if versions:
                    return Path(place), versions[0]
    raise ImportError("no mlx with its C++ headers was found")
