"""metrics.jsonl: every number of a run, one JSON object for each event.

- Used by: the driver writes it; plots and tests read it, and trackers receive each event. An event has `step`, the
  number of finished rollouts when it was made (0 before the first).
- Invariant: a resumed run continues the file as the uninterrupted run would have: what was written after the checkpoint
  is cut off first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from slime.observability.samples_file import SAMPLES, NewSamples
from slime.observability.trackers import Record, Tracker


class MetricsLog:
    """Append-only, except that `rewind` removes what a resumed run had written after its checkpoint."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        self._trackers: list[Tracker] = []
        self._take_samples: list[Tracker] = []
        self._samples: NewSamples | None = None
        self._say: Callable[[str], None] = print

    def track(self, trackers: Sequence[Tracker], say: Callable[[str], None]) -> None:
        """Pass events on to `trackers` too, starting with those in the file that they lack. `say` prints warnings.

        They also get a few of the samples that are written from now on, with the first event after them.
        """
        self._trackers, self._take_samples, self._say = list(trackers), list(trackers), say
        self._samples = NewSamples(self.path.with_name(SAMPLES))
        for event in read_metrics(self.path):
            self._hand_on(int(event.pop("step")), event)

    def write(self, step: int, metrics: Record) -> None:
        """Append one event and flush it to the operating system."""
        self._file.write(json.dumps({"step": step, **metrics}, allow_nan=True).encode() + b"\n")
        self._file.flush()
        if self._samples is not None and self._take_samples:
            self._hand_on_samples(self._samples, step)
        self._hand_on(step, metrics)

    def _hand_on_samples(self, samples: NewSamples, step: int) -> None:
        for at, split, rows in samples.take(step):
            for tracker in [tracker for tracker in self._take_samples if at >= tracker.begin]:
                try:
                    tracker.log_samples(at, split, rows)
                except Exception as error:  # noqa: BLE001 (as below)
                    self._take_samples.remove(tracker)
                    self._say(f"WARNING {tracker.name} takes no samples ({error}); samples.jsonl has them")

    def _hand_on(self, step: int, metrics: Record) -> None:
        for tracker in [tracker for tracker in self._trackers if step >= tracker.begin]:
            try:
                tracker.log(step, metrics)
            except Exception as error:  # noqa: BLE001 (no error of a tracker may end a run)
                self._trackers.remove(tracker)
                self._take_samples = [one for one in self._take_samples if one is not tracker]
                self._say(f"WARNING {tracker.name} failed ({error}) and gets no more data; metrics.jsonl has it all")

    def repair(self) -> str | None:
        """Move lines that are not events into `metrics-damaged.jsonl`; return a warning about them, or None.

        Only complete lines are moved. A last line that was cut short by a kill is removed without a warning.
        """
        self._file.seek(0)
        lines = self._file.readlines()
        whole = [line for line in lines if line.endswith(b"\n")]
        damaged = [(number, line) for number, line in enumerate(whole, 1) if parse_event(line) is None]
        aside = self.path.with_name(f"{self.path.stem}-damaged.jsonl")
        if damaged:
            with aside.open("ab") as file:
                file.writelines(line for _, line in damaged)
        if damaged or len(whole) < len(lines):
            bad = {number for number, _ in damaged}
            written = self.path.with_name(f".tmp_{self.path.name}")
            written.write_bytes(b"".join(line for number, line in enumerate(whole, 1) if number not in bad))
            written.rename(self.path)
            self._file.close()
            self._file = self.path.open("a+b")
        if not damaged:
            return None
        numbers = ", ".join(str(number) for number, _ in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        return f"{self.path}:{numbers}: not an event; {len(damaged)} such lines were moved to {aside.name}"

    def rewind(self, step: int) -> None:
        """Keep the events before `step` and the first one of `step`: those that a checkpoint of that step had seen."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            event = json.loads(line)
            if event["step"] > step:
                break
            end += len(line)
            if event["step"] == step:
                break
        self._file.truncate(end)
        self._file.seek(0, 2)

    def close(self) -> None:
        ok = sys.exc_info()[0] is None  # close is called while the error that ends the run is handled
        for tracker in self._trackers:
            try:
                tracker.finish(ok=ok)
            except Exception as error:  # noqa: BLE001 (as above)
                self._say(f"WARNING {tracker.name} failed at the end ({error})")
        self._file.close()


def parse_event(line: bytes) -> dict[str, float] | None:
    """Return one line of a metrics.jsonl as an event; None if it is not a JSON object with a step."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and type(cast(dict[str, Any], event).get("step")) is int
    return cast(dict[str, float], event) if is_event else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return all events of a metrics.jsonl, in order.

    Raises:
        ValueError: a line is not an event; the message names file and line.
    """
    events: list[dict[str, float]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            event = parse_event(line)
            if event is None:
                raise ValueError(f"{path}:{number}: not an event (a JSON object with a step); remove the line")
            events.append(event)
    return events
