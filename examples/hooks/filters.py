"""What is trained on: which groups, in which order, which samples.

--dynamic-sampling-filter-path examples.hooks.filters.not_too_easy
--buffer-filter-path examples.hooks.filters.newest_first
--rollout-sample-filter-path examples.hooks.filters.no_truncated
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.args import Args
from slime.core.sample import Sample, Status


@dataclass
class Verdict:
    """`reason` names the metric that counts what was dropped: rollout/groups_dropped/too_easy."""

    keep: bool
    reason: str


def not_too_easy(args: Args, samples: list[Sample], **kwargs: object) -> Verdict:
    """Groups whose mean reward is below 0.9; samples whose reward failed are not shown."""
    mean = sum(sample.reward_value(args.reward_key) for sample in samples) / len(samples)
    return Verdict(mean < 0.9, "too_easy")


def newest_first(args: Args, rollout_id: int, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """The groups that came back last; what is taken is taken out of the buffer."""
    return [buffer.pop() for _ in range(min(len(buffer), num_samples))]


def no_truncated(args: Args, samples: list[Sample]) -> None:
    """Responses that were cut off stay in their group's baseline, and out of the loss."""
    for sample in samples:
        if sample.status is Status.TRUNCATED:
            sample.loss_mask = [0] * sample.response_length
