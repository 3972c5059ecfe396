"""SaveSchedule: after which rollouts a checkpoint is due, by their number or by the clock.

- Used by: `Cluster.save_if_due`.
- Invariant: the last rollout is always saved, unless --save-interval 0 turns saving off.

The clock decides only when the state is written, and writing changes nothing of it, so results do not depend on it. In
the asynchronous loop with --deterministic a save waits for the rollout in flight; the weight sync after it would wait
for that rollout anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from slime.config.args import Args

MOST_OF_THE_TIME = 0.03
"""The largest share of the time that saves by the clock take: one of 30 s happens every 1000 s at most."""


class SaveSchedule:
    """The schedule of a run whose last rollout is `last`. The clock starts now."""

    def __init__(self, args: Args, last: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._args = args
        self._last = last
        self._clock = clock
        self._since = clock()
        self._cost = 0.0

    def due(self, rollout_id: int) -> bool:
        """Return whether a checkpoint is due after this rollout."""
        interval, minutes = self._args.save_interval, self._args.save_interval_minutes
        if self._args.save is None or interval == 0:
            return False
        by_number = interval is not None and (rollout_id + 1) % interval == 0
        passed = self._clock() - self._since
        by_clock = minutes is not None and passed >= max(60 * minutes, self._cost / MOST_OF_THE_TIME)
        return by_number or by_clock or rollout_id == self._last

    def begun(self) -> None:
        """Take note of a save that begins now."""
        self._since = self._clock()

    def saved(self, seconds: float) -> None:
        """Take note that the save took `seconds` until it was complete."""
        self._cost = seconds
