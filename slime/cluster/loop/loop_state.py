"""The rollouts that the training loop has in hand: one whose generation has begun, and one that is not saved yet.

- Used by: `Cluster`, whose verbs make and complete them.
- Invariant: they hold numbers and references only. The state itself is in the processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Generation:
    """A rollout whose generation has begun. `parts` and `report` are references that the rollout manager fills."""

    rollout_id: int
    parts: list[Any]
    """One for each data-parallel rank; empty without trainers."""
    report: Any
    waited: float = 0.0
    """Seconds in which the loop did nothing but wait for this rollout."""


@dataclass
class Trained:
    """The last rollout that was trained on, until it is saved, with what its save needs from the driver."""

    rollout_id: int
    policy_version: int
    """The version before its weights are sent; a resumed run sends them first."""
    times: dict[str, float] | None = None
    """The times of its step, once the step is over."""
