"""The built-in rewards by `--rm-type`.

Path: `pool` checks the name at start, `worker` calls the function. Invariant: importing this loads neither torch nor
sympy, so that a worker is light.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.rm_hub.deepscaler import deepscaler

Reward = Callable[[Args, Sample], object]


def _deepscaler(args: Args, sample: Sample) -> float:
    if sample.label is None:
        raise ValueError("the sample has no label; --label-key names its key in the data file")
    return deepscaler(sample.response, sample.label)


def _random(args: Args, sample: Sample) -> float:
    """0 or 1 by the seed and the sample's number: a control that teaches nothing."""
    return float(random.Random(f"{args.rollout_seed}/{sample.index}").randint(0, 1))


REWARDS: Mapping[str, Reward] = {"deepscaler": _deepscaler, "random": _random}


def reward_type(args: Args, sample: Sample, rm_type: str | None = None) -> str | None:
    """What judges the sample: its metadata goes first, then `rm_type` (a data set's own), then --rm-type.

    None under --custom-rm-path, and where nothing names one.
    """
    if args.custom_rm_path is not None:
        return None
    return sample.metadata.get("rm_type") or rm_type or args.rm_type


def find_reward(rm_type: str) -> Reward:
    """The function of an `--rm-type`.

    Raises:
        ValueError: there is none of this name.
    """
    if rm_type not in REWARDS:
        raise ValueError(
            f"--rm-type {rm_type}: no such reward here; there are {', '.join(REWARDS)}, "
            "and --custom-rm-path takes your own function"
        )
    return REWARDS[rm_type]
