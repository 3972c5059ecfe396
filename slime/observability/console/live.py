"""The live view of a run in a terminal: at most five lines at the bottom, which are redrawn in place.

- Used by: `run_console`, whose rich.live.Live draws it twice a second.
- Invariant: no line is wider than the terminal: bar, count and time left come first, and what does not fit is left out.

    rollout 12  ━━━━━━━━━━━━───────────────────  12/50     14:20 left
    generating  ━━━━━━━━━━━━━━━━━━━━━──────────  83/128     0:12 left  3.1k tokens/s
    reward      0.423 ▁▂▂▃▄▅▅▆▇
    eval aime   0.310 ▁▃▅
    length 211.4 (most 512)  staleness 0.5  3.1k tokens/s  memory 4.1 GB  faults 0
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from rich.console import Console, ConsoleOptions
from rich.text import Text

from slime.observability.console.lines import samples_parts
from slime.observability.console.text import bar, clock, joined, number, sparkline
from slime.observability.console.view import View
from slime.observability.phases import MEASURED

NAME, COUNT, LEFT = 12, 11, 13
"""Columns of a line's name, of its count, and of the time left."""
WIDEST_BAR = 50
MOST_CURVES = 3
"""Evaluated data sets with a curve; the others are in their own lines above."""
SPINNER, SPINNER_ASCII = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"
logger = logging.getLogger(__name__)


class LiveView:
    """Draws the view that `current` returns, at the width of the terminal."""

    def __init__(self, current: Callable[[], View], *, ascii_only: bool) -> None:
        self._current = current
        self._ascii = ascii_only
        self._failed = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        try:
            lines = draw(self._current(), options.max_width, time.monotonic(), ascii_only=self._ascii)
        except Exception:  # the view must not end a run
            if not self._failed:
                logger.exception("the live view cannot be drawn")
            self._failed = True
            lines = []
        yield from lines


def draw(view: View, width: int, now: float, *, ascii_only: bool = False) -> list[Text]:
    """Return the lines of the view, each at most `width` columns wide."""
    width = max(1, width - 1)  # a full line would make some terminals scroll
    if view.stage is not None:
        return [_stage_line(view, width, now, ascii_only=ascii_only)]
    if view.phase is None and view.rollout_id is None:
        return []
    lines = [_run_line(view, width, now, ascii_only=ascii_only)] if view.total else []
    if view.phase is not None:
        lines.append(_phase_line(view, width, now, ascii_only=ascii_only))
    lines += _curves(view, width, ascii_only=ascii_only)
    facts = _facts(view)
    if facts:
        lines.append(Text(joined(facts, width), style="dim"))
    return lines


def _stage_line(view: View, width: int, now: float, *, ascii_only: bool) -> Text:
    elapsed = now - view.stage_since
    signs = SPINNER_ASCII if ascii_only else SPINNER
    parts = [f"{signs[int(elapsed * 4) % len(signs)]} {view.stage}", clock(elapsed), view.note]
    text = Text(joined([part for part in parts if part], width), no_wrap=True)
    text.stylize("cyan", 0, 1)
    return text


def _bar_line(name: str, share: float | None, count: str, rest: list[str], width: int, *, ascii_only: bool) -> Text:
    """Return name, bar, count and the parts of `rest` that fit; the first one of these is the time left."""
    size = max(4, min(WIDEST_BAR, (width - NAME - COUNT - LEFT - 6) * 2 // 3))
    full, empty = bar(share, size, ascii_only=ascii_only)
    head = joined([f"{name:<{NAME}}"], NAME)
    left = f"{rest[0]:>{LEFT}}" if rest[0] else " " * LEFT
    tail = joined([f"{count:<{COUNT}}{left}", *rest[1:]], width - NAME - size - 2)
    text = Text(no_wrap=True, overflow="crop")
    text.append(head or name[:NAME], "bold").append(full, "cyan").append(empty, "dim").append("  " + tail.rstrip())
    text.truncate(width)
    return text


def _run_line(view: View, width: int, now: float, *, ascii_only: bool) -> Text:
    left = view.run_left(now)
    name = "rollouts" if view.rollout_id is None else f"rollout {view.rollout_id}"
    rest = ["" if left is None else f"{clock(left)} left"]
    return _bar_line(name, view.done / view.total, f"{view.done}/{view.total}", rest, width, ascii_only=ascii_only)


def _phase_line(view: View, width: int, now: float, *, ascii_only: bool) -> Text:
    phase, samples = view.phase, view.samples
    assert phase is not None
    left, of_rollout = view.phase_left(now), view.rollout_left(now)
    elapsed = clock(now - phase.since)
    rest = [f"{clock(left)} left" if left is not None else "" if samples is None else f"{elapsed} so far"]
    rest += samples_parts(view)[0 if samples is None else 1 :]
    if of_rollout is not None and left is not None and of_rollout > left + 1:
        rest.append(f"rollout {clock(of_rollout)} left")
    count = elapsed if samples is None else f"{samples.generated}/{samples.total}"
    return _bar_line(phase.verb, view.phase_share(now), count, rest, width, ascii_only=ascii_only)


def _curves(view: View, width: int, *, ascii_only: bool) -> list[Text]:
    curves = [("reward", view.rewards)] if view.rewards else [("loss", view.losses)] if view.losses else []
    curves += [(f"eval {name}", values) for name, values in sorted(view.evaluations.items())[:MOST_CURVES]]
    lines: list[Text] = []
    name_width = min(max([NAME, *(len(name) + 1 for name, _ in curves)]), max(NAME, width // 3))
    for name, values in curves:
        short = name if len(name) < name_width else name[: name_width - 2] + "~"
        now = number(values[-1], ".3f")
        text = Text(f"{short:<{name_width}}{now:>7} ", no_wrap=True, overflow="crop")
        text.append(
            sparkline(values, min(60, width - name_width - len(f"{now:>7}") - 1), ascii_only=ascii_only), "green"
        )
        text.truncate(width)
        lines.append(text)
    return lines


def _facts(view: View) -> list[str]:
    """Return facts about the last rollout, and the faults of the run."""
    last, facts = view.last, list[str]()
    if "rollout/response_length" in last:
        most = last.get("rollout/response_length_max")
        longest = "" if most is None else f" (longest {most:.0f})"
        facts.append(f"length {number(last['rollout/response_length'], '.1f')}{longest}")
    if "rollout/staleness" in last:
        facts.append(f"staleness {number(last['rollout/staleness'], '.1f')}")
    if "rollout/tokens_per_second" in last:
        facts.append(f"{number(last['rollout/tokens_per_second'], '.0f')} tokens/s")
    memory = [
        last[key] for phase in MEASURED for kind in ("device", "peak") if (key := f"memory/{phase}_{kind}_gb") in last
    ]
    if memory:
        facts.append(f"memory {number(max(memory), '.1f')} GB")
    faults = f"faults {view.faults}"
    return [faults, *facts] if view.faults else [*facts, faults] if facts else []
