"""On-policy distillation: the student samples, and learns each token by how much likelier its teacher finds it.

The gradient of the reverse KL, KL(student || teacher), over the student's own responses, taken token by token (GKD,
arXiv:2306.13649, section 3 with lambda 1; MiniLLM, arXiv:2306.08543, whose single-step part of the gradient this is).
What a token does to those behind it is left out, as in GKD: it would only add variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards


def on_policy_distillation(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """log p_teacher - log p_student of each token, by the student's weights before the rollout's first step."""
    assert rollout.kl_R is not None, "the rules ask for a teacher, and the trainer for its log-probs"
    return torch.where(rollout.mask_R, -rollout.kl_R.double(), 0.0)
