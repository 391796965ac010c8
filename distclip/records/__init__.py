"""Records of what was clipped and why, a line per step: written during training, read back, and drawn."""
