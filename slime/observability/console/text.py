"""Bars, sparklines, durations and numbers as text, and lines that fit into a width.

- Used by: everything that the console shows.
- Invariant: the same quantity always has the same number of digits; a line loses whole parts, never half a word.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

PLAIN_WIDTH = 100
"""The most columns of a line that describes a rollout or its progress."""
LEVELS, LEVELS_ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
HUGE = 1e6
"""Numbers from here on are written with an exponent; otherwise a diverging loss would fill the line."""


def number(value: float, form: str) -> str:
    """Return `value` in `form`, such as '.3f', without the sign of a rounded zero."""
    if not math.isfinite(value):
        return str(value)
    text = format(value, ".2e" if abs(value) >= HUGE else form)
    return text.removeprefix("-") if text.startswith("-") and float(text) == 0 else text


def short_count(value: float) -> str:
    """Return a count in few characters: 950, 3.1k, 12k, 1.2M."""
    for limit, divisor, unit in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit * 0.9995:
            scaled = value / divisor
            return f"{scaled:.1f}{unit}" if unit and scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value / 1e9:.1f}G"


def duration(seconds: float) -> str:
    """Return a measured duration: 0.4 s, 12.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Return seconds as 0:07, 14:20, 1:02:03 or 3 d 11 h."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def joined(parts: Sequence[str], width: int, *, between: str = "  ") -> str:
    """Join the parts that fit into `width` columns, from the first on; the first one that does not fit ends it."""
    line = ""
    for part in parts:
        longer = line + between + part if line else part
        if cell_len(longer) > width:
            break
        line = longer
    return line


def wrapped(text: str, width: int, *, indent: int = 0) -> str:
    """Break lines between words. A word that is longer than a line, such as a path, stays whole.

    `indent`: the spaces before the rest of a broken line.
    """
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    wrapper.subsequent_indent = " " * indent
    broken = [wrapper.wrap(line) or [""] for line in text.split("\n")]
    return "\n".join(line for lines in broken for line in lines)


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Return the last `width` values as one character each, from the lowest of them to the highest."""
    levels = LEVELS_ASCII if ascii_only else LEVELS
    shown = values[-width:] if width > 0 else ()
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span = high - low
    scale = (len(levels) - 1) / span if span > 0 else 0.0
    return "".join(levels[round((value - low) * scale)] if math.isfinite(value) else " " for value in shown)


def bar(share: float | None, width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """Return the full and the empty part of a bar for a share between 0 and 1; None is an empty bar."""
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    count = round(min(1.0, max(0.0, share or 0.0)) * width)
    return full * count, empty * (width - count)
