"""REINFORCE++ with baseline: rewards less their group's mean, then as REINFORCE++ (arXiv:2501.03262).

Whitening is over the whole rollout, where grpo divides by each group's own standard deviation.
"""

from __future__ import annotations

from torch import Tensor

from slime.algo.advantages.grpo import grpo_advantages
from slime.algo.advantages.reinforce_plus_plus import whitened_returns
from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards


def reinforce_plus_plus_baseline(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """The baseline is that of the rewards alone; KL stays each token's own."""
    centred_N = grpo_advantages(rollout.rewards_N.double(), rollout.group_indices_N, normalize_std=False)
    return whitened_returns(rollout, centred_N, options)
