"""The wall time of a step, by phase.

- Used by: the driver opens a step, each verb of the loop measures itself, and the record goes to the metrics log.
- Invariant: the phases of a step, including `idle`, sum to its wall time; `idle` is the time that no phase claimed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

PHASES = ("generation", "reward", "offload", "training", "weight_sync", "checkpoint", "evaluation")
"""The phases of a step.

`offload` is the time in which engines and trainers that share devices release memory and take it back. A rollout that
is generated in the background counts as `generation` only while the loop waits for it.
"""
MEASURED = ("generation", "training", "weight_sync", "evaluation")
"""Phases at whose end the trainers report their peak memory."""


@dataclass
class StepClock:
    """The wall seconds of one step, by phase. `clock` gives seconds; only differences count."""

    clock: Callable[[], float] = time.perf_counter
    started: float = field(init=False)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def __post_init__(self) -> None:
        self.started = self.clock()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count everything inside the block as `name`."""
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - start

    @contextmanager
    def inner(self) -> Generator[dict[str, float]]:
        """Account for work that is measured elsewhere: fill the yielded dict with seconds by phase.

        Raises:
            AssertionError: it claims more than the wall time of the block (with a millisecond of slack).
        """
        start = self.clock()
        claimed: dict[str, float] = {}
        yield claimed
        wall = self.clock() - start
        assert sum(claimed.values()) <= wall + 1e-3, f"phases claim {claimed} of {wall:.3f} s"
        for name, seconds in claimed.items():
            self.seconds[name] += seconds

    def close(self) -> dict[str, float]:
        """Return `time/<phase>` for each phase, `time/idle` and `time/step`, in seconds."""
        wall = self.clock() - self.started
        record = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        record["time/idle"] = wall - sum(self.seconds.values())
        record["time/step"] = wall
        return record


def format_shares(record: Mapping[str, float]) -> str:
    """Return one line with each phase's share of the step; shares below 0.05 % are left out."""
    wall = record["time/step"]
    shares = {name: record[f"time/{name}"] / wall for name in (*PHASES, "idle")}
    parts = [f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares.items() if share >= 0.0005]
    return f"{wall:.2f} s = " + " + ".join(parts)


def memory_record(phase: str, peaks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return `memory/<phase>_<name>_gb`: the maximum of the trainers' `peaks` in GB; empty if they have none."""
    names = peaks[0] if peaks else ()
    return {f"memory/{phase}_{name}_gb": max(peak[name] for peak in peaks) for name in names}


def format_memory(record: Mapping[str, float]) -> str:
    """Return one line with the peak memory of each phase, of the whole device if known, otherwise of a trainer."""
    parts: list[str] = []
    for phase in MEASURED:
        found = [record[key] for kind in ("device", "peak") if (key := f"memory/{phase}_{kind}_gb") in record]
        if found:
            parts.append(f"{phase.replace('_', ' ')} {found[0]:.3g}")
    return f"GB at most: {', '.join(parts)}" if parts else ""
