"""Advantages: the rewards of a rollout -> one advantage for each response token, one file per estimator.

- Called by: the trainer, once on the whole rollout (`megatron.advantages`); the loss reads the result.
- Where the rest is: the rows of `slime.algo.estimators` name the functions, and the form of the loss of each.

Read `rollout_rewards` first (what an estimator is given), then `grpo`, the shortest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from slime.algo.advantages.rollout_rewards import AdvantageOptions, Estimator, RolloutRewards, counted_rows
from slime.algo.estimators import ESTIMATOR_FACTS

__all__ = ["ESTIMATORS", "AdvantageOptions", "Estimator", "RolloutRewards", "counted_rows"]


def _function(file: str) -> Estimator:
    return vars(import_module(f"{__name__}.{file}"))[file]


ESTIMATORS: Mapping[str, Estimator] = {name: _function(facts.file or name) for name, facts in ESTIMATOR_FACTS.items()}
"""The function of each estimator in `ESTIMATOR_FACTS`."""
