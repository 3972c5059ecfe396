"""What a run of train.py is doing at this moment, seen from outside.

Path: `sweep` watches a run with this until the moment of its kill. Invariant: nothing of the run is changed or asked:
Ray writes the method that an actor is in into the title of its process, and everything here is read from there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SCAN_S = 0.25
"""Between two searches for the run's actors; titles of known ones are read each time."""
POLL_S = 0.001

START, GENERATION, TRAINING, SAVE, SYNC, EVALUATION = (
    "start-up",
    "generation",
    "training",
    "save",
    "weight sync",
    "evaluation",
)
PHASES = (START, GENERATION, TRAINING, SAVE, SYNC, EVALUATION)
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


@dataclass(frozen=True)
class Span:
    """One occurrence of a phase: the `number`th of its name, in seconds since the run was started."""

    phase: str
    number: int
    start: float
    end: float


class Life:
    """Follows the run whose driver is `pid`, from its start."""

    def __init__(self, pid: int) -> None:
        self.driver = psutil.Process(pid)
        self._begin = time.monotonic()
        self._actors: dict[int, str] = {}
        self._scanned = -SCAN_S
        self.spans: list[Span] = [Span(START, 0, 0.0, 0.0)]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def look(self) -> Span:
        """The phase that the run is in, or was in last; `spans` has all until now."""
        now = self.seconds
        if now - self._scanned >= SCAN_S:
            self._scan()
            self._scanned = self.seconds
        phases = {_PHASE_OF.get(title) for title in map(_title, self._actors)}
        # while it trains one rollout, an asynchronous run generates the next
        phase = next((name for name in (SAVE, SYNC, TRAINING, EVALUATION, GENERATION, START) if name in phases), None)
        last = self.spans[-1]
        if phase is None or phase == last.phase:
            if phase is not None:
                self.spans[-1] = Span(last.phase, last.number, last.start, now)
        else:
            number = sum(span.phase == phase for span in self.spans)
            self.spans.append(Span(phase, number, now, now))
        return self.spans[-1]

    def idle(self) -> bool:
        """Whether the phase that `look` has just told has ended, and no other has begun."""
        return all(_PHASE_OF.get(_title(pid)) is None for pid in self._actors)

    def actors(self, role: str) -> list[psutil.Process]:
        """The run's processes of a role, in the order of their start: trainers by rank."""
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
    """`TrainWorker.train`, while the process is in that method; empty where it is no actor of Ray's, or gone."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""
    return title.removeprefix("ray::") if title.startswith("ray::") else ""
