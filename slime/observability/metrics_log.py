"""metrics.jsonl: every number of a run, one JSON object an event.

Path: the driver writes; plots, trackers and tests read. Each event has `step` (finished rollouts when it was made,
0 before the first). Invariant: a resumed run continues the file as the unbroken run would have: whatever was written
behind the checkpoint's cursor is cut off first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsLog:
    """Append-only; `cursor` goes into the checkpoint and `rewind` takes it back out."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab")

    def write(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Append one event and flush it to the operating system."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=True).encode() + b"\n")
        self._file.flush()

    @property
    def cursor(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def rewind(self, cursor: int) -> None:
        """Cut the file back to `cursor` bytes; a shorter file (it was moved, say) stays as it is."""
        if cursor < self._file.tell():
            self._file.truncate(cursor)
            self._file.seek(cursor)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All events of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
