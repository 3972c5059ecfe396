"""RewardHints: notice rollouts from which a run cannot learn, because there are no differences between rewards.

- Used by: `run_console`, with the metrics of each rollout.
- Invariant: a hint that stays true is repeated at counts that double, so a whole run has few of them.
"""

from __future__ import annotations

from collections.abc import Mapping

IN_A_ROW = 3
"""Rollouts in which all samples have one and the same reward, after which this is said."""


class RewardHints:
    """Hints of one run, whose estimator compares the samples of each of the `num_groups` groups of a rollout."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._seen = 0
        self._equal = 0
        self._flat = 0
        self._flat_reward = 0.0

    def of(self, rollout_id: int, record: Mapping[str, float]) -> list[str]:
        """Return what has to be said about this rollout; mostly nothing."""
        reward, spread = record.get("rollout/reward"), record.get("rollout/reward_std")
        if reward is None or spread is None:
            return []
        self._seen += 1
        said: list[str] = []
        if record.get("rollout/zero_std_groups", 0) >= self._num_groups:
            self._equal += 1
            if _is_power_of_two(self._equal):
                often = f" ({self._equal} of {self._seen} rollouts so far)" if self._equal > 1 else ""
                groups = f"all {self._num_groups} groups have" if self._num_groups > 1 else "its group has"
                said.append(f"rollout {rollout_id}: {groups} equal rewards: nothing to learn{often}")
        self._flat = (self._flat + 1 if self._flat and reward == self._flat_reward else 1) if spread == 0 else 0
        self._flat_reward = reward
        if self._flat % IN_A_ROW == 0 and self._flat and _is_power_of_two(self._flat // IN_A_ROW):
            said.append(
                f"WARNING all samples of {self._flat} rollouts have the reward {reward:.3g}: look at labels, rewards "
                "and answers"
            )
        return said


def _is_power_of_two(count: int) -> bool:
    return count > 0 and count & (count - 1) == 0
