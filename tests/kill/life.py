"""Watch from outside which phase a run of train.py is in.

- Used by: `sweep` watches a run until the moment of its kill.
- Invariant: the run is neither changed nor asked. Ray writes the method that an actor runs into the title of its
  process, and everything here is read from these titles.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SCAN_S = 0.25
"""Seconds between two searches for the run's actors; the titles of known ones are read each time."""
POLL_S = 0.004

START, GENERATION, TRAINING, SAVE, SYNC, EVALUATION, WRITE = (
    "start-up",
    "generation",
    "training",
    "save",
    "weight sync",
    "evaluation",
    "write",
)
PHASES = (START, GENERATION, TRAINING, SAVE, SYNC, EVALUATION, WRITE)
"""In a save the trainers copy; the write of what they have copied goes on in other phases."""
TRAINER, MANAGER = "TrainWorker", "RolloutManager"
_PHASE_OF = {
    "TrainWorker.load": START,
    "TrainWorker.train": TRAINING,
    "TrainWorker.save": SAVE,
    "TrainWorker.send_weights": SYNC,
    "RolloutManager.start": START,
    "RolloutManager.generate": GENERATION,
    "RolloutManager.evaluate": EVALUATION,
}


EVAL_INTERVAL = 2
"""The --eval-interval of every run that is watched."""


@dataclass(frozen=True)
class Span:
    """One occurrence of a phase, the `number`th of its name; times are seconds since the start of the run."""

    phase: str
    number: int
    start: float
    end: float


class Life:
    """Follows a run from its start; `pid` is its driver, and `save` its directory of checkpoints."""

    def __init__(self, pid: int, save: Path) -> None:
        self._save = save
        self.driver = psutil.Process(pid)
        self._begin = time.monotonic()
        self._actors: dict[int, str] = {}
        self._scanned = -SCAN_S
        self.spans: list[Span] = [Span(START, 0, 0.0, 0.0)]
        self.writes: list[Span] = []
        """The spans in which a checkpoint was written; they overlap with the others."""
        self.is_writing = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def look(self) -> Span:
        """Return the phase that the run is in, or was in last; `spans` and `writes` have all phases so far."""
        now = self.seconds
        self._look_at_writes(now)
        if now - self._scanned >= SCAN_S:
            self._scan()
            self._scanned = self.seconds
        phases = {_PHASE_OF.get(title) for title in map(_title, self._actors)}
        # an asynchronous run generates the next rollout while it trains on one
        phase = next((name for name in (SAVE, SYNC, TRAINING, EVALUATION, GENERATION, START) if name in phases), None)
        if phase == GENERATION and sum(span.phase == TRAINING for span in self.spans) % EVAL_INTERVAL == 0:
            phase = EVALUATION  # the manager does both at once; the title has the name of what began last
        last = self.spans[-1]
        if phase is None or phase == last.phase:
            if phase is not None:
                self.spans[-1] = Span(last.phase, last.number, last.start, now)
        else:
            number = sum(span.phase == phase for span in self.spans)
            self.spans.append(Span(phase, number, now, now))
        return self.spans[-1]

    def _look_at_writes(self, now: float) -> None:
        before, self.is_writing = self.is_writing, any(self._save.glob(".tmp_iter_*"))
        if self.is_writing and not before:
            self.writes.append(Span(WRITE, len(self.writes), now, now))
        elif self.is_writing:
            last = self.writes[-1]
            self.writes[-1] = Span(WRITE, last.number, last.start, now)

    def idle(self) -> bool:
        """Return whether the phase that `look` last returned has ended, and no other has begun."""
        return all(_PHASE_OF.get(_title(pid)) is None for pid in self._actors)

    def actors(self, role: str) -> list[psutil.Process]:
        """Return the run's processes of a role in the order of their start, which is by rank for trainers."""
        self._scan()
        pids = [pid for pid in self._actors if _title(pid).split(".")[0] == role]
        return sorted(filter(None, map(_process, pids)), key=lambda process: process.create_time())

    def _scan(self) -> None:
        try:
            family = self.driver.children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._actors = {
            process.pid: title for process in family if (title := _title(process.pid)).startswith((TRAINER, MANAGER))
        }


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _title(pid: int) -> str:
    """Return the method that an actor runs, such as `TrainWorker.train`; empty if it is no actor of Ray's, or gone."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""
    return title.removeprefix("ray::") if title.startswith("ray::") else ""
