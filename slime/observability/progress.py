"""How far the rollout manager is, as numbers that travel from it to the console.

- Used by: `rollout.progress` makes them when the driver asks, and the console shows them.
- Invariant: nothing that trains or generates reads them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleProgress:
    """The samples of a rollout or of an evaluation: how many there will be, and how many there are."""

    total: int
    generated: int
    judged: int
    tokens: int
    """Response tokens of the requests that have ended."""
    seconds: float
    """Seconds since the first prompt was drawn."""
    dropped: int = 0
    """Groups that were dropped, which are not in the other counts."""

    @property
    def share(self) -> float:
        """The share that is done. Judging is a part of the work that is usually short."""
        return min(1.0, self.generated / self.total) if self.total else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class WorkProgress:
    """The work of the rollout manager at a moment: a rollout, an evaluation, both, or neither."""

    rollout_id: int | None = None
    rollout: SampleProgress | None = None
    evaluation: SampleProgress | None = None
