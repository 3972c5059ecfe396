"""metrics.jsonl: every number of a run, one JSON object an event.

Path: the driver writes; plots, trackers and tests read. Each event has `step` (finished rollouts when it was made,
0 before the first). Invariant: a resumed run continues the file as the unbroken run would have: whatever was written
behind the checkpoint is cut off first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """Append-only, except that `rewind` takes back what the run to be continued wrote behind its checkpoint."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")

    def write(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Append one event and flush it to the operating system."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=True).encode() + b"\n")
        self._file.flush()

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
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All events of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
