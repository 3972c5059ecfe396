"""Decide which finished groups are kept, and post-process the samples of a full rollout.

- Called by: `collect`, for each group as it is settled, and once more for the full rollout.
- Invariant: a filter sees only samples that have a reward. Every dropped group has a reason, which is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slime.config.args import Args
from slime.core.plugins import hook_function
from slime.core.sample import Sample, Status
from slime.core.user_code import split_path


class Acceptance:
    """The rules of one run for keeping a group."""

    def __init__(self, args: Args) -> None:
        self._args = args
        self._filter = _load_filter(args)

    def drop_reason(self, samples: list[Sample]) -> str | None:
        """Return why a group whose samples have all ended cannot be kept, or None if it is kept.

        Raises:
            ValueError: --reward-key does not fit its rewards.
        """
        judged = [sample for sample in samples if sample.reward is not None]
        for sample in judged:
            sample.reward_value(self._args.reward_key)
        if all(sample.status is Status.FAILED and not sample.response_length for sample in samples) and not judged:
            return "generation_failed"
        if len(judged) < (2 if self._args.compares_group else 1):
            return "too_few_rewards"
        return None if self._filter is None else self._filter(judged)


def _load_filter(args: Args) -> Callable[[list[Sample]], str | None] | None:
    """Return --dynamic-sampling-filter-path as a function that gives the reason to drop a group, or None to keep it."""
    path = args.dynamic_sampling_filter_path
    if path is None:
        return None
    function = hook_function("dynamic_sampling_filter_path", path)

    def drop_reason(samples: list[Sample]) -> str | None:
        verdict = function(args, samples)
        if bool(verdict.keep if hasattr(verdict, "keep") else verdict):
            return None
        reason = verdict.reason if hasattr(verdict, "reason") else None
        return str(reason or split_path(path)[1]).replace(" ", "_").replace("/", "_")

    return drop_reason


def post_process(args: Args, samples: list[Sample]) -> None:
    """Apply --rollout-sample-filter-path and --custom-reward-post-process-path to `samples`, in place.

    Raises:
        ValueError: a hook did not return what it has to.
    """
    if args.rollout_sample_filter_path is not None:
        for sample in samples:
            if sample.loss_mask is None:
                sample.set_arrays(loss_mask=np.ones(sample.response_length, dtype=np.int8))
        hook_function("rollout_sample_filter_path", args.rollout_sample_filter_path)(args, samples)
        for sample in samples:
            sample.check()
    path = args.custom_reward_post_process_path
    if path is not None:
        rewards = list(hook_function("custom_reward_post_process_path", path)(args, samples))
        if len(rewards) != len(samples):
            raise ValueError(
                f"--custom-reward-post-process-path {path}: it returned {len(rewards)} rewards for {len(samples)} "
                "samples; it has to return one each"
            )
        for sample, reward in zip(samples, rewards, strict=True):
            if sample.reward is not None:
                sample.metadata["raw_reward"] = sample.reward
                sample.reward = _with_reward(sample.reward, args.reward_key, float(reward))


def _with_reward(before: float | dict[str, Any], key: str | None, reward: float) -> float | dict[str, Any]:
    """Return the reward with its value replaced; the other entries of a dict-valued reward stay."""
    if key is None:
        return reward
    return {**before, key: reward} if isinstance(before, dict) else {key: reward}


def mask_truncated(args: Args, samples: list[Sample]) -> None:
    """Apply --mask-truncated-samples in place: a truncated sample counts in no loss and no denominator.

    This is DAPO's overlong filtering (arXiv:2503.14476, section 3.4). The rewards of these samples stay, so the
    baseline of their group does not change.
    """
    if not args.mask_truncated_samples:
        return
    for sample in samples:
        if sample.status is Status.TRUNCATED:
            sample.set_arrays(loss_mask=np.zeros(sample.response_length, dtype=np.int8))
