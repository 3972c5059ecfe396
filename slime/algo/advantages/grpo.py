"""Group-relative advantages, used by grpo, gspo and cispo, which differ only in the loss.

Source: DeepSeekMath (arXiv:2402.03300, section 4.1.2); without the division by the standard deviation it is Dr. GRPO
(arXiv:2503.20783). Invariant: the advantages are exactly 0 when all rewards of a group are equal.

Example: the rewards 1, 0, 0, 1 of one prompt have mean 0.5 and (unbiased) standard deviation 0.577, which gives the
advantages 0.866, -0.866, -0.866, 0.866 on every token of the respective response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards, judged_groups


def grpo(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return each sample's group-relative advantage on each of its tokens; with kl_coef, the reward includes the KL.

    The KL is summed over the whole response before groups are compared.
    """
    rewards_N = rollout.shaped_rewards_N(options)
    return rollout.spread(grpo_advantages(rewards_N, rollout.group_indices_N, normalize_std=options.normalize_std))


def grpo_advantages(rewards_N: Tensor, group_indices_N: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Return [N], (r - mean) / (std + 1e-6) within each group, or r - mean without `normalize_std`.

    The std is unbiased. Computed in float64, returned in the dtype of the rewards. A failed reward, and one that is
    alone in its group, gets 0.
    """
    advantages_N = torch.zeros(len(rewards_N), dtype=torch.float64)
    for rows_G in judged_groups(rewards_N, group_indices_N):
        rewards_G = rewards_N[rows_G].double()
        # Compare the rewards and not the std with 0: the mean of equal rewards may be off by a rounding error, which
        # the division by a tiny std would blow up.
        if len(rows_G) < 2 or bool((rewards_G == rewards_G[0]).all()):
            continue
        advantages_G = rewards_G - rewards_G.mean()
        if normalize_std:
            advantages_G = advantages_G / (rewards_G.std() + 1e-6)
        advantages_N[rows_G] = advantages_G
    return advantages_N.to(rewards_N.dtype)
