"""The declarations of all flags: slime's own in `options`, the other programs' in checked-in tables."""
