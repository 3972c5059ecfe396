"""Advantages: the rewards of a rollout -> one advantage for each response token, one file per estimator.

- Called by: the trainer, once on the whole rollout (`megatron.advantages`); the loss reads the result.
- Where the rest is: `slime.algo.estimators` lists which form of the loss goes with which estimator.

Read `rollout_rewards` first (what an estimator is given), then `grpo`, the shortest one.
"""

from __future__ import annotations

from collections.abc import Mapping

from slime.algo.advantages.gae import gae
from slime.algo.advantages.grpo import grpo
from slime.algo.advantages.on_policy_distillation import on_policy_distillation
from slime.algo.advantages.reinforce_plus_plus import reinforce_plus_plus
from slime.algo.advantages.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from slime.algo.advantages.rloo import rloo
from slime.algo.advantages.rollout_rewards import AdvantageOptions, Estimator, RolloutRewards, counted_rows

__all__ = ["ESTIMATORS", "AdvantageOptions", "Estimator", "RolloutRewards", "counted_rows"]

ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": grpo,
    "gspo": grpo,
    "cispo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "ppo": gae,
    "on_policy_distillation": on_policy_distillation,
}
