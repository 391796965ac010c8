"""The passes over the gradients that this rank holds, by a native kernel or by MLX operations."""

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."  # makes the native kernel again
MLX_VERSIONS = (0, 32, 3), (0, 33)  # from the first, and below the second, as pyproject.toml says
