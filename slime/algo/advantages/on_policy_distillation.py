"""On-policy distillation: the student samples, and its teacher's log-prob of each token is the learning signal.

This is the gradient of the reverse KL, KL(student || teacher), over the student's own responses, token by token (GKD,
arXiv:2306.13649, section 3 with lambda 1; MiniLLM, arXiv:2306.08543, calls it the single-step part of the gradient).
The effect of a token on later tokens is left out, as in GKD: it would only add variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards


def on_policy_distillation(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return log p_teacher - log p_student of each token, for the student before the rollout's first step."""
    assert rollout.kl_R is not None, "distillation needs the teacher's log-probs"
    return torch.where(rollout.mask_R, -rollout.kl_R.double(), 0.0)
