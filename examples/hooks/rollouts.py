"""Hooks around a rollout: the rollout itself, an evaluation, the source of prompts, and a log.

--rollout-function-path examples.hooks.rollouts.count_right --eval-function-path examples.hooks.rollouts.evaluate_twice
--data-source-path examples.hooks.rollouts.EasyFirst --custom-rollout-log-function-path
examples.hooks.rollouts.log_longest
"""

from __future__ import annotations

from pathlib import Path

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.collect import generate_rollout
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.evaluate import Evaluator


async def count_right(args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext) -> RolloutResult:
    """Run the built-in rollout and add one metric."""
    result = await generate_rollout(args, rollout_id, data_source, context)
    result.metrics["rollout/num_right"] = sum(sample.reward == 1 for group in result.groups for sample in group)
    return result


async def evaluate_twice(args: Args, rollout_id: int, context: RolloutContext) -> dict[str, float]:
    """Run the built-in evaluation with two seeds and average the results."""
    first = await Evaluator(args, context.tokenizer).run(rollout_id, context)
    second = await Evaluator(args, context.tokenizer).run(rollout_id + 1_000_000, context)
    return {name: (value + second[name]) / 2 for name, value in first.items() if name in second}


class EasyFirst(DataBuffer):
    """The built-in data source, with the groups of each rollout sorted by prompt length."""

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        groups = super().get_groups(num, rollout_id=rollout_id)
        return sorted(groups, key=lambda group: group[0].prompt_length)


def log_longest(args: Args, rollout_id: int, samples: list[Sample], metrics: dict[str, float]) -> None:
    """Append one line for each rollout to a file next to the logs."""
    longest = max(samples, key=lambda sample: sample.response_length)
    with Path(args.resolved.log_dir, "longest.txt").open("a") as file:
        file.write(f"{rollout_id} {longest.response_length} {longest.response!r}\n")
