"""Programs that train with MLX and know nothing of distclip: their optimizers, clipped."""
