"""Every flag, declared once: slime's own in `options`, the others' in checked-in tables."""
