"""The metrics of a rollout: `rollout/*` and its share of `time/*`.

- Called by: `collect` counts into a Tally while it runs, and asks for the metrics at the end.
- Invariant: rewards are the raw ones, before any post-processing. Samples whose reward failed are counted separately,
  never as a reward of 0.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slime.config.args import Args
from slime.core.columns import Array
from slime.core.sample import MULTI_TURN, Sample, Status
from slime.rollout.intervals import PhaseIntervals
from slime.rollout.reward_pool.verdict import CODE_VERDICT
from slime.sandbox.run import Outcome

MAX_NAMED = 32
"""The number of entries of a reward dict that get a metric."""


@dataclass
class Tally:
    """Counts taken while the rollout runs; dropped groups are gone at its end."""

    tokens: int = 0
    """Response tokens generated, also for dropped and aborted samples, but not for what goes back as it was drawn."""
    surplus_groups: int = 0
    partial_groups: int = 0
    """Surplus groups that keep their tokens."""
    restarted_groups: int = 0
    dropped_groups: Counter[str] = field(default_factory=Counter[str])
    failed_rewards: Counter[str] = field(default_factory=Counter[str])
    failed_generations: int = 0
    """Samples whose custom generate function failed."""


def sample_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics of lengths and statuses."""
    lengths = [sample.response_length for sample in samples]
    return {
        "response_length": statistics.fmean(lengths),
        "response_length_max": max(lengths),
        "truncated": statistics.fmean(sample.status is Status.TRUNCATED for sample in samples),
    }


def entry_metrics(samples: Sequence[Sample], key: str | None) -> dict[str, float]:
    """Return the means of finite numbers in dict-valued rewards, except under `key`: `reward/NAME`, at most MAX_NAMED.

    If some judged samples have no number under a name, `reward_share/NAME` is the share of the samples that have one.
    """
    judged = [sample.reward for sample in samples if sample.reward is not None]
    values: dict[str, list[float]] = {}
    for reward in judged:
        for name, value in reward.items() if isinstance(reward, dict) else ():
            named = re.sub(r"[^\w.@+-]", "_", name)[:40]
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if name != key and is_number and (named in values or len(values) < MAX_NAMED):
                values.setdefault(named, []).append(value)
    means = {f"reward/{name}": statistics.fmean(numbers) for name, numbers in values.items()}
    shares = {f"reward_share/{name}": len(numbers) / len(judged) for name, numbers in values.items()}
    return means | {name: share for name, share in shares.items() if share < 1}


def verdict_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the share of each verdict among the samples whose code was run: `reward/verdict_right` and so on."""
    judged = [sample.metadata[CODE_VERDICT] for sample in samples if CODE_VERDICT in sample.metadata]
    if not judged:
        return {}
    return {f"reward/verdict_{name}": judged.count(name) / len(judged) for name in Outcome}


def group_metrics(args: Args, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return the metrics of groups of samples: rewards (if any was judged), lengths and statuses."""
    rewards_by_group = [
        [sample.reward_value(args.reward_key) for sample in group if sample.reward is not None] for group in groups
    ]
    rewards = [reward for group in rewards_by_group for reward in group]
    samples = [sample for group in groups for sample in group]
    found = sample_metrics(samples) | entry_metrics(samples, args.reward_key) | verdict_metrics(samples)
    metrics = {f"rollout/{name}": value for name, value in found.items()}
    if rewards:
        metrics["rollout/reward"] = statistics.fmean(rewards)
        metrics["rollout/reward_std"] = statistics.pstdev(rewards)
        metrics["rollout/zero_std_groups"] = sum(min(group) == max(group) for group in rewards_by_group if group)
    return metrics


def replay_metrics(args: Args, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return the metrics of groups from a dump, as in the rollout that made them: rewards before post-processing."""
    return group_metrics(args, [[_with_raw_reward(sample) for sample in group] for group in groups])


def _with_raw_reward(sample: Sample) -> Sample:
    raw = copy.copy(sample)
    raw.reward = sample.metadata.get("raw_reward", sample.reward)
    return raw


def rollout_metrics(
    args: Args, groups: Sequence[Sequence[Sample]], tally: Tally, intervals: PhaseIntervals, policy_version: int
) -> dict[str, float]:
    """Return the metrics of the kept `groups`; lengths are in tokens, times in seconds, shares between 0 and 1."""
    samples = [sample for group in groups for sample in group]
    generation = intervals.generation_seconds
    metrics: dict[str, float] = {
        **group_metrics(args, groups),
        "rollout/surplus_groups": tally.surplus_groups,
        "rollout/tokens": tally.tokens,
        "rollout/tokens_per_second": tally.tokens / generation if generation > 0 else 0.0,
        "time/generation": generation,
        "time/reward": intervals.reward_seconds,
    }
    if args.partial_rollout:
        metrics["rollout/partial_groups"] = tally.partial_groups
    if args.max_staleness is not None:
        metrics["rollout/restarted_groups"] = tally.restarted_groups
    turns = [sample.metadata[MULTI_TURN]["num"] for sample in samples if MULTI_TURN in sample.metadata]
    if turns:
        metrics["rollout/num_turns"] = statistics.fmean(turns)
    metrics |= _staleness(samples, policy_version)
    for reason, count in sorted(tally.dropped_groups.items()):
        metrics[f"rollout/groups_dropped/{reason}"] = count
    if tally.failed_generations:
        metrics["rollout/generation_failed"] = tally.failed_generations
    for reason, count in sorted(tally.failed_rewards.items()):
        metrics[f"rollout/reward_failed/{reason}"] = count
    return metrics


def _versions_of_sampled(sample: Sample) -> Array | None:
    """Return the versions of tokens that a policy sampled: those of loss mask 0 may be a tool's output."""
    versions_R, mask_R = sample.array("policy_versions"), sample.array("loss_mask")
    return versions_R if versions_R is None or mask_R is None else versions_R[mask_R != 0]


def _staleness(samples: Sequence[Sample], policy_version: int) -> dict[str, float]:
    """Return how many versions the sampled tokens are older than `policy_version`; nothing if there are none."""
    found = [row for row in map(_versions_of_sampled, samples) if row is not None and len(row)]
    count = sum(map(len, found))
    if not count:
        return {}
    total = sum(int(row.sum(dtype=np.int64)) for row in found)
    old = sum(int(np.count_nonzero(row < policy_version)) for row in found)
    return {
        "rollout/staleness": policy_version - total / count,
        "rollout/staleness_max": policy_version - min(int(row.min()) for row in found),
        "rollout/offpolicy_tokens": old / count,
    }
