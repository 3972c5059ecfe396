"""ProgressBoard: where the rollout and the evaluation in progress can be looked at.

- Used by: `collect` and `evaluate` put up a function that counts; the rollout manager calls it when the driver asks.
- Invariant: counting happens only when somebody looks, reads only, and draws no random number, so it cannot change what
  is generated. The last one that was put up is shown until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from slime.observability.progress import SampleProgress, WorkProgress

Count = Callable[[], SampleProgress]


class ProgressBoard:
    """Shows a rollout and an evaluation, which may run at the same time."""

    def __init__(self) -> None:
        self._rollout: tuple[int, Count] | None = None
        self._evaluation: Count | None = None

    @contextmanager
    def rollout(self, rollout_id: int, count: Count) -> Generator[None]:
        """Show rollout `rollout_id` inside the block."""
        mine = self._rollout = rollout_id, count
        try:
            yield
        finally:
            if self._rollout is mine:
                self._rollout = None

    @contextmanager
    def evaluation(self, count: Count) -> Generator[None]:
        """Show an evaluation inside the block."""
        self._evaluation = count
        try:
            yield
        finally:
            if self._evaluation is count:
                self._evaluation = None

    def look(self) -> WorkProgress:
        """Count what is in progress now."""
        evaluation = None if self._evaluation is None else self._evaluation()
        if self._rollout is None:
            return WorkProgress(evaluation=evaluation)
        rollout_id, count = self._rollout
        return WorkProgress(rollout_id, count(), evaluation)
