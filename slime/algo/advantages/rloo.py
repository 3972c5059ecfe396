"""RLOO: REINFORCE with the mean of the other samples of the prompt as baseline (arXiv:2402.14740, section 2.3).

The whole response is one action, and its reward includes the KL of the whole response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, judged_groups


def rloo(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return r_i - (the mean of r_j over j != i) within each group, on each token of response i."""
    rewards_N = rollout.shaped_rewards_N(options)
    advantages_N = torch.zeros_like(rewards_N)
    for rows_G in judged_groups(rewards_N, rollout.group_indices_N):
        if len(rows_G) > 1:
            rewards_G = rewards_N[rows_G]
            advantages_N[rows_G] = rewards_G - (rewards_G.sum() - rewards_G) / (len(rows_G) - 1)
    return rollout.spread(advantages_N)
