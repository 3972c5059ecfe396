"""Hooks from rewards to the loss.

--custom-reward-post-process-path examples.hooks.training.minus_length
--custom-convert-samples-to-train-data-path examples.hooks.training.only_judged
--custom-advantage-function-path examples.hooks.training.reward_minus_mean
--loss-type custom_loss --custom-loss-function-path examples.hooks.training.reinforce
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.core.batch import Array, TrainBatch, from_samples
from slime.core.sample import Sample


def minus_length(args: Args, samples: list[Sample]) -> list[float]:
    """Subtract up to 0.1, in proportion to the response's length; a failed reward stays failed (nan)."""
    limit = args.rollout_max_response_len
    return [
        float("nan")
        if sample.reward is None
        else sample.reward_value(args.reward_key) - 0.1 * sample.response_length / limit
        for sample in samples
    ]


def only_judged(args: Args, samples: list[Sample]) -> TrainBatch:
    """Leave out samples whose reward failed; the loss would ignore them anyway."""
    return from_samples([sample for sample in samples if sample.reward is not None], args.reward_key)


def reward_minus_mean(args: Args, batch: TrainBatch) -> Array:
    """Use the mean reward of the whole rollout as the baseline."""
    rewards_N = np.nan_to_num(batch.columns["rewards"])
    return np.repeat(rewards_N - rewards_N.mean(), batch.response_lengths_N).astype(np.float32)


def reinforce(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE: Williams, "Simple statistical gradient-following algorithms", 1992."""
    loss_R = -inputs.advantages_R * inputs.log_probs_R
    return loss_R, {"pg_loss": loss_R.detach()}
