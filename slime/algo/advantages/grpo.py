"""Group-relative advantages: the estimator of grpo, and of gspo and cispo, which differ in the loss.

DeepSeekMath (arXiv:2402.03300, section 4.1.2); without the division by the standard deviation Dr. GRPO
(arXiv:2503.20783). Invariant: exactly 0 where all rewards of a group are equal.

Shapes: _N samples of the rollout, _G samples of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, judged_groups


def grpo(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """A sample's advantage on each of its tokens; KL in the reward is that of the whole response."""
    rewards_N = rollout.shaped_rewards_N(options)
    return rollout.spread(grpo_advantages(rewards_N, rollout.group_indices_N, normalize_std=options.normalize_std))


def grpo_advantages(rewards_N: Tensor, group_indices_N: Tensor, *, normalize_std: bool = True) -> Tensor:
    """[N]: (r - mean) / (std + 1e-6) within each group, std unbiased; r - mean without `normalize_std`.

    Computed in float64, returned in the rewards' dtype. 0 for a failed reward, and for one alone in its group.
    """
    advantages_N = torch.zeros(len(rewards_N), dtype=torch.float64)
    for rows_G in judged_groups(rewards_N, group_indices_N):
        rewards_G = rewards_N[rows_G].double()
        # Equal rewards by comparison: their mean may miss them by a rounding, which a tiny std would blow up.
        if len(rows_G) < 2 or bool((rewards_G == rewards_G[0]).all()):
            continue
        advantages_G = rewards_G - rewards_G.mean()
        if normalize_std:
            advantages_G = advantages_G / (rewards_G.std() + 1e-6)
        advantages_N[rows_G] = advantages_G
    return advantages_N.to(rewards_N.dtype)
