"""metrics.jsonl: every number of a run, one JSON object an event.

Path: the driver writes; plots and tests read, and trackers are handed each event. An event has `step` (finished
rollouts when it was made, 0 before the first). Invariant: a resumed run continues the file as the unbroken run would
have: whatever was written behind the checkpoint is cut off first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from slime.observability.trackers import Record, Tracker


class MetricsLog:
    """Append-only, except that `rewind` takes back what the run to be continued wrote behind its checkpoint."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        self._trackers: list[Tracker] = []
        self._say: Callable[[str], None] = print

    def track(self, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        """Hand events on to `trackers`, too, beginning with what the file holds and they lack. `say`: for warnings."""
        self._trackers, self._say = list(trackers), say
        for event in read_metrics(self.path):
            self._hand_on(int(event.pop("step")), event)

    def write(self, step: int, metrics: Record) -> None:
        """Append one event and flush it to the operating system."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=True).encode() + b"\n")
        self._file.flush()
        self._hand_on(step, metrics)

    def _hand_on(self, step: int, metrics: Record) -> None:
        for tracker in [tracker for tracker in self._trackers if step >= tracker.begin]:
            try:
                tracker.write(step, metrics)
            except Exception as error:  # noqa: BLE001 (whatever it is, no run ends for the sake of its plots)
                self._trackers.remove(tracker)
                self._say(f"WARNING {tracker.name} failed ({error}); nothing more goes there, metrics.jsonl has it all")

    def rewind(self, step: int) -> None:
        """Keep the events before `step` and the first of `step` itself: what a checkpoint of that step had seen.

        A line that a kill has cut short goes too.
        """
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            event = json.loads(line)
            if event["step"] > step:
                break
            end += len(line)
            if event["step"] == step:
                break
        self._file.truncate(end)
        self._file.seek(0, 2)

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # closed on the way out of a run that ends with an error
        for tracker in self._trackers:
            try:
                tracker.close(failed=failed)
            except Exception as error:  # noqa: BLE001 (as above)
                self._say(f"WARNING {tracker.name} failed at the end ({error})")
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All events of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
