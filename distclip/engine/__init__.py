"""The passes over the gradients that this rank holds, by a native kernel or by MLX operations."""

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."  # makes the native kernel again
MLX_VERSIONS = (0, 32, 3), (0, 33)  # from the first, and below the second, as pyproject.toml says


def mlx_package(system: str, version: str | None = None) -> str:
    """What pip installs on a system (``platform.system()``) to have MLX in a version, or in one of those that serve."""
    oldest, newer = (".".join(map(str, numbers)) for numbers in MLX_VERSIONS)
    package = "mlx[cpu]" if system == "Linux" else "mlx"  # on Linux MLX is two packages
    return f"{package}=={version}" if version else f"{package}>={oldest},<{newer}"
