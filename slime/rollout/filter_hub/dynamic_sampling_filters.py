"""Dynamic sampling filters decide which finished groups are worth training on: `f(args, samples, **kwargs)`.

- Called by: `collect`, for each group as it finishes.
- Invariant: a filter reads the samples and changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from slime.config.args import Args
from slime.core.sample import Sample


def check_reward_nonzero_std(args: Args, samples: list[Sample], **kwargs: Any) -> torch.Tensor:
    """Return whether the rewards differ: a group that is all right or all wrong has no advantage to learn from.

    Samples whose reward failed are not counted. The test is `max > min`, which equals `std() > 0` except for rounding:
    the standard deviation of three rewards of 0.1 comes out above 0.
    """
    rewards = torch.tensor([s.reward_value(args.reward_key) for s in samples if s.reward is not None])
    if len(rewards) < 2:
        return torch.tensor(False)
    return rewards.max() > rewards.min()
