"""What was clipped and why, one line per step: written during training, read back, and drawn."""
