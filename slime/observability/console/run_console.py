"""RunConsole: what a run says while it starts, during its rollouts, and at its end.

- Used by: the driver reports each stage, phase and record, and the rollout manager's progress.
- Invariant: nothing here changes the run. What is said also goes into logs/driver.log; if the console itself cannot be
  written to any more, that is the only place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.text import Text

from slime.observability.console.hints import RewardHints
from slime.observability.console.lines import evaluation_lines, progress_line, results_of, rollout_line
from slime.observability.console.live import LiveView
from slime.observability.console.text import PLAIN_WIDTH, duration, wrapped
from slime.observability.console.view import View
from slime.observability.progress import WorkProgress

STAGE_S = 20.0
"""Seconds after which a plain log says that a stage of the start goes on."""
PHASE_S = 30.0
"""Seconds after which a plain log says how far a phase is."""
DRAWN_PER_SECOND = 4
STYLES = {"WARNING": "yellow", "FAULT": "bold red", "ERROR": "bold red"}
logger = logging.getLogger("slime.console")


class Output(Console):
    """The console of rich, which would end the run if the reader of its output has ended (`slime train | head`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the reader of the output has ended")


class RunConsole:
    """Shows a live view on a terminal, and plain lines if the output is a file."""

    def __init__(self, console: Output | None = None) -> None:
        """`console` is where it writes; the default is this process's output."""
        self._console = Output(highlight=False, soft_wrap=True) if console is None else console
        self.in_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        """Whether there is a live view; plain lines about progress are printed otherwise."""
        self._ascii = not self._console.encoding.lower().startswith("utf")
        self._view = View(0, 0)
        self._hints: RewardHints | None = None
        self._lost = False
        self._closed = threading.Event()
        self._live: Live | None = None
        self._ticker: threading.Thread | None = None
        self._said_at = 0.0
        self._later: list[str] = []
        if self.in_terminal:
            view = LiveView(lambda: self._view, ascii_only=self._ascii)
            self._live = Live(view, console=self._console, refresh_per_second=DRAWN_PER_SECOND, transient=True)
            self._live.start()
        else:
            self._ticker = threading.Thread(target=self._tick_until_closed, name="console", daemon=True)
            self._ticker.start()

    # ---- lines

    def say(self, text: str, *, whole: bool = False) -> None:
        """Print a text above the live view, and log it. `whole` lines are not broken, so that they can be copied."""
        logger.info("%s", text)
        self._print(text, whole=whole)

    def log(self, text: str) -> None:
        """Log a text that has been printed already."""
        logger.info("%s", text)

    def _print(self, text: str, *, whole: bool) -> None:
        if self._lost:
            return
        if self.in_terminal and not whole:
            text = wrapped(text, max(20, self._console.width))
        if self._ascii:
            text = text.replace("…", "...").replace("±", "+-")
            text = text.encode(self._console.encoding, "replace").decode(self._console.encoding)
        try:
            self._console.print(Text(text, style=STYLES.get(text.split(" ", 1)[0], "")), soft_wrap=True)
        except (OSError, ValueError) as error:  # the terminal or the reader of a pipe is gone; the run is not
            self._lost = True
            logger.warning("the console cannot be written to any more (%s); the run goes on", error)

    # ---- the start

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Show a stage of the start, and say how long it took, unless it fails."""
        begin = time.monotonic()
        before = self._view
        self._said_at = begin
        self._view = replace(before, stage=name, note="", stage_since=begin)
        try:
            yield
        finally:
            self._view = replace(self._view, stage=before.stage, note=before.note, stage_since=before.stage_since)
        self.say(f"{name} … {duration(time.monotonic() - begin)}")

    def note(self, text: str) -> None:
        """Show what the present stage is busy with."""
        self._view = replace(self._view, note=text)

    # ---- the loop

    def begin(self, *, total: int, done: int, hints: RewardHints | None, faults: int) -> None:
        """Begin a loop of `total` rollouts, of which `done` are done."""
        self._view = replace(self._view, total=total, done=done, faults=self._view.faults + faults)
        self._hints = hints

    def begin_rollout(self, rollout_id: int) -> None:
        self._view = self._view.with_rollout(rollout_id, time.monotonic())

    @contextmanager
    def phase(self, name: str, where: str) -> Generator[None]:
        """Show a phase of `where`, such as "rollout 3", inside the block; a phase inside it takes its place."""
        outer = self._view.phase
        self._said_at = time.monotonic()
        self._view = self._view.with_phase(name, where, self._said_at)
        try:
            yield
        finally:
            again = (None, "") if outer is None else (outer.name, outer.where)
            self._view = self._view.with_phase(*again, time.monotonic())

    def progress(self, work: WorkProgress) -> None:
        """Show the rollout manager's progress."""
        self._view = replace(self._view, work=work)

    def evaluation(self, step: int, record: Mapping[str, float]) -> None:
        """Print one line for each data set that was evaluated after `step` rollouts: after the last one's own line."""
        self._view = self._view.with_evaluation(results_of(record))
        self._later += evaluation_lines(step, record, self._width)
        if self._view.done >= step:
            self._say_later()

    def rollout(self, rollout_id: int, record: Mapping[str, float]) -> None:
        """Print one line for the rollout, and hints about it."""
        self._view = self._view.with_rollout_done(record, time.monotonic())
        self.say(rollout_line(rollout_id, record, self._width))
        for hint in () if self._hints is None else self._hints.of(rollout_id, record):
            self.say(hint)
        self._say_later()

    def _say_later(self) -> None:
        lines, self._later = self._later, []
        for line in lines:
            self.say(line)

    @property
    def _width(self) -> int:
        """The columns of a line: also in a wide terminal no more than in a log."""
        return min(PLAIN_WIDTH, self._console.width) if self.in_terminal else PLAIN_WIDTH

    # ---- plain logs

    def _tick_until_closed(self) -> None:
        while not self._closed.wait(1.0):
            self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Say how far a stage or a phase is, if it has taken long since that was said."""
        view = self._view
        if view.stage is not None:
            line = f"{view.stage} … {now - view.stage_since:.0f} s so far{f': {view.note}' if view.note else ''}"
            elapsed, first = now - view.stage_since, STAGE_S
        elif view.phase is not None:
            line, elapsed, first = progress_line(view, now), now - view.phase.since, PHASE_S
        else:
            return
        if line is not None and now - self._said_at >= max(first, elapsed / 10):
            self._said_at = now
            self.say(line)

    def close(self) -> None:
        """End the live view; lines can still be said."""
        self._say_later()
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join(timeout=1.0)  # it may hang in a write to an output that nobody reads
        if self._live is not None:
            self._live.stop()
