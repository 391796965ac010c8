"""Models of mlx-lm, sharded: the norm of the layout is that of the whole model."""

from __future__ import annotations
