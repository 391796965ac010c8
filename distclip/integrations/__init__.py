"""distclip inside the trainers of other packages. Each module needs its package, and is imported by name."""
