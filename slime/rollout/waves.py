"""Waves of `--over-sampling-batch-size` prompts: after too many whole waves without a kept group the run ends.

- Called by: `collect` puts each group that it draws into a wave, and reports how it ended.
- Invariant: only a whole wave is judged, because groups that fail or are dropped tend to end first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from slime.config.args import Args


@dataclass
class Wave:
    """The counts of one wave, whose groups are consecutive in the order of drawing."""

    drawn: int = 0
    settled: int = 0
    kept: int = 0
    failed: int = 0


class Waves:
    """The waves of one rollout."""

    def __init__(self, args: Args, rollout_id: int) -> None:
        self._rollout_id = rollout_id
        self._max_empty = args.max_empty_waves
        self.size = args.over_sampling_batch_size or args.rollout_batch_size
        self._waves: list[Wave] = []
        self._empty = 0

    @property
    def begun(self) -> bool:
        """Whether any group was drawn."""
        return bool(self._waves)

    def join(self) -> Wave:
        """Return the wave of the next group that is drawn."""
        if not self._waves or self._waves[-1].drawn == self.size:
            self._waves.append(Wave())
        self._waves[-1].drawn += 1
        return self._waves[-1]

    def kept(self, wave: Wave) -> None:
        wave.settled += 1
        wave.kept += 1
        self._empty = 0

    def dropped(self, wave: Wave, reason: str, dropped: Counter[str], last_error: Exception | None) -> None:
        """Count a dropped group of `wave`; `dropped` holds the whole rollout's groups by reason.

        Raises:
            RuntimeError: nothing was kept in --max-empty-waves waves, or generation failed for all groups of one.
        """
        wave.settled += 1
        wave.failed += reason == "generation_failed"
        if wave.settled < self.size or wave.kept:
            return
        if wave.failed == self.size:
            raise RuntimeError(
                f"rollout {self._rollout_id}: generation failed for all of {wave.failed} groups, the last error: "
                f"{last_error}; the logs of the engines and of the rollout have the reason"
            ) from last_error
        self._empty += 1
        if self._empty == self._max_empty:
            reasons = ", ".join(f"{count} by {reason}" for reason, count in dropped.items())
            raise RuntimeError(
                f"rollout {self._rollout_id}: nothing was kept in {self._max_empty} waves of {self.size} prompts "
                f"(--max-empty-waves {self._max_empty}); dropped: {reasons}; prompts that are sometimes right and "
                "sometimes wrong, a higher --rollout-temperature or more --n-samples-per-prompt give groups to keep"
            )
