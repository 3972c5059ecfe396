"""From rewards to the loss.

    --custom-reward-post-process-path examples.hooks.training.minus_length
    --custom-convert-samples-to-train-data-path examples.hooks.training.only_judged
    --custom-advantage-function-path examples.hooks.training.reward_minus_mean
    --loss-type custom_loss --custom-loss-function-path examples.hooks.training.reinforce

Shapes: _N samples, _R response tokens.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from slime.algo.losses import LossInputs, LossOptions
from slime.config.args import Args
from slime.core.batch import Array, TrainBatch, from_samples
from slime.core.sample import Sample


def minus_length(args: Args, samples: list[Sample]) -> list[float]:
    """A tenth less for a response as long as it may be; one whose reward failed stays without."""
    limit = args.rollout_max_response_len
    return [
        float("nan")
        if sample.reward is None
        else sample.reward_value(args.reward_key) - 0.1 * sample.response_length / limit
        for sample in samples
    ]


def only_judged(args: Args, samples: list[Sample]) -> TrainBatch:
    """Without the samples whose reward failed, which would be left out of the loss anyway."""
    return from_samples([sample for sample in samples if sample.reward is not None], args.reward_key)


def reward_minus_mean(args: Args, batch: TrainBatch) -> Array:
    """The whole rollout as one baseline."""
    rewards_N = np.nan_to_num(batch.columns["rewards"])
    return np.repeat(rewards_N - rewards_N.mean(), batch.response_lengths_N).astype(np.float32)


def reinforce(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Williams, "Simple statistical gradient-following algorithms", 1992."""
    loss_R = -inputs.advantages_R * inputs.log_probs_R
    return loss_R, {"pg_loss": loss_R.detach()}
