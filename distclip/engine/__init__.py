"""The passes over the gradients that this rank holds, by a native kernel or by MLX operations."""

REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir distclip"  # makes the native kernel again
