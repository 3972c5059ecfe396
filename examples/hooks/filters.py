"""Filters: which groups are trained on, in which order, and which samples.

--dynamic-sampling-filter-path examples.hooks.filters.not_too_easy --buffer-filter-path
examples.hooks.filters.newest_first --rollout-sample-filter-path examples.hooks.filters.no_truncated
"""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.args import Args
from slime.core.sample import Sample, Status


@dataclass
class Verdict:
    """The decision on a group. `reason` names the metric of dropped groups: rollout/groups_dropped/too_easy."""

    keep: bool
    reason: str


def not_too_easy(args: Args, samples: list[Sample], **kwargs: object) -> Verdict:
    """Keep groups whose mean reward is below 0.9. Samples whose reward failed are not in `samples`."""
    mean = sum(sample.reward_value(args.reward_key) for sample in samples) / len(samples)
    return Verdict(mean < 0.9, "too_easy")


def newest_first(args: Args, rollout_id: int, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """Take the groups that came back last; they are removed from the buffer."""
    return [buffer.pop() for _ in range(min(len(buffer), num_samples))]


def no_truncated(args: Args, samples: list[Sample]) -> None:
    """Keep truncated responses out of the loss; they still count in their group's baseline."""
    for sample in samples:
        if sample.status is Status.TRUNCATED:
            sample.loss_mask = [0] * sample.response_length
