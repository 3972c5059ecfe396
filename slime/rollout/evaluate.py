"""Evaluation: every prompt of every data set, sampled and judged; mean reward with its standard error.

Path: called before the first rollout, every --eval-interval rollouts and after the last. Invariant: the same prompts,
sampled from the same seeds, whatever the training prompts were; nothing of it goes into training.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slime.config.args import Args
from slime.config.context import rollout_limits
from slime.config.data_files import DataKeys
from slime.config.eval_data import EvalDataset, eval_datasets
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.rollout.context import RolloutContext, gather_or_cancel, request_slots
from slime.rollout.generate import load_generate, rollout_sampling_params, sampling_seed
from slime.rollout.prompts import Prompt, PromptSet, load_prompts
from slime.rollout.rm_hub.deepscaler import boxed_answer
from slime.rollout.rm_hub.registry import reward_type
from slime.rollout.rollout_metrics import sample_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_MAX_ABORTS = 100
"""Requests of one response: a rollout in flight that has enough aborts whatever its engines do, and it goes on."""


class Evaluator:
    """The data sets, tokenised once."""

    def __init__(self, args: Args, tokenizer: PreTrainedTokenizerBase) -> None:
        self._args = args
        self._data: list[tuple[EvalDataset, PromptSet]] = []
        longest = rollout_limits(args).request
        for dataset in eval_datasets(args):
            keys = DataKeys.of(args, input_key=dataset.input_key, label_key=dataset.label_key)
            self._data.append((dataset, load_prompts(dataset.path, args, tokenizer, keys, longest=longest)))

    async def run(self, rollout_id: int, context: RolloutContext) -> dict[str, float]:
        """All data sets at once: metrics `eval/<name>/...` of the weights that the engines hold now.

        Raises:
            RuntimeError: not one response of a data set could be generated and judged.
        """
        slots = await request_slots(self._args, context)
        results = await asyncio.gather(
            *(self._run_dataset(dataset, data, rollout_id, context, slots) for dataset, data in self._data)
        )
        return {
            f"eval/{dataset.name}/{name}": value
            for (dataset, _), metrics in zip(self._data, results, strict=True)
            for name, value in metrics.items()
        }

    async def _run_dataset(
        self,
        dataset: EvalDataset,
        data: PromptSet,
        rollout_id: int,
        context: RolloutContext,
        slots: asyncio.Semaphore,
    ) -> dict[str, float]:
        start = time.perf_counter()
        args = replace(self._args, use_routing_replay=False)  # nothing is trained on these
        count = dataset.n_samples_per_eval_prompt
        generate = load_generate(args)
        params = replace(
            rollout_sampling_params(args),
            temperature=dataset.temperature,
            top_p=dataset.top_p,
            top_k=dataset.top_k or -1,
            max_new_tokens=dataset.max_response_len,
        )

        async def run_sample(sample: Sample, seed: int) -> Sample:
            async with slots:
                try:
                    for _ in range(_MAX_ABORTS):
                        sample = await generate(args, sample, replace(params, sampling_seed=seed), context)
                        if sample.status is not Status.ABORTED:
                            break
                except EngineError as error:
                    return sample.to_failed(f"generation failed: {error}")
            if sample.status is Status.ABORTED:
                sample.reward_failure = f"aborted by the engine, {_MAX_ABORTS} times"
            elif sample.reward is None and not context.rewards.by_group:
                (await context.rewards.judge(sample, rm_type=dataset.rm_type)).apply(sample)
            return sample

        async def run_group(number: int, prompt: Prompt) -> list[Sample]:
            work = [
                run_sample(
                    prompt.to_sample(group_index=number, index=number * count + draw),
                    sampling_seed(args.rollout_seed, "eval", dataset.name, number, draw, rollout_id),
                )
                for draw in range(count)
            ]
            samples = await gather_or_cancel(work)
            if context.rewards.by_group:
                await context.rewards.judge_group(samples)
            return samples

        groups = await gather_or_cancel([run_group(number, prompt) for number, prompt in enumerate(data.prompts)])
        return {**eval_metrics(args, dataset, groups), "time": time.perf_counter() - start}


def eval_metrics(args: Args, dataset: EvalDataset, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Of one data set; a group is one prompt's responses. Failed ones are counted and left out of every mean.

    `format` is the share that deepscaler would read an answer from: it stands only where deepscaler is the judge.
    pass@k takes a response for right or wrong: it stands only where every reward is 0 or 1, or every one -1 or 1.

    Raises:
        RuntimeError: all failed.
    """
    samples = [sample for group in groups for sample in group]
    judged = [sample for sample in samples if sample.reward is not None]
    if not judged:
        raise RuntimeError(
            f"evaluation on {dataset.name}: none of {len(samples)} responses was judged; "
            f"the first: {samples[0].reward_failure}"
        )
    rewards_by_prompt = [
        [sample.reward_value(args.reward_key) for sample in group if sample.reward is not None] for group in groups
    ]
    means = [statistics.fmean(rewards) for rewards in rewards_by_prompt if rewards]
    metrics: dict[str, float] = {
        **_mean_over_prompts("reward", means),
        **sample_metrics(judged),
        "num_prompts": len(groups),
        "failed": 1 - len(judged) / len(samples),
    }
    if all(reward_type(args, sample, dataset.rm_type) == "deepscaler" for sample in judged):
        metrics["format"] = statistics.fmean(boxed_answer(sample.response) is not None for sample in judged)
    values = {reward for rewards in rewards_by_prompt for reward in rewards}
    right_or_wrong = values <= {0, 1} or values <= {-1, 1}
    if right_or_wrong:
        for k in dataset.pass_at_ks:
            chances = [
                pass_at_k(len(rewards), sum(reward == 1 for reward in rewards), k)
                for rewards in rewards_by_prompt
                if len(rewards) >= k
            ]
            if chances:
                metrics |= _mean_over_prompts(f"pass@{k}", chances)
    if len(judged) < len(samples):
        first = next(sample for sample in samples if sample.reward is None)
        logger.warning("evaluation on %s: %d responses failed, the first: %s", dataset.name,
                       len(samples) - len(judged), first.reward_failure)  # fmt: skip
    return metrics


def _mean_over_prompts(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean and its standard error; prompts are what was drawn, so several responses to one count as one value."""
    mean = {name: statistics.fmean(values)}
    if len(values) > 1:
        mean[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    return mean


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of k responses is right, drawn from the n seen without replacement.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et al., "Evaluating large language models trained on
    code", 2021 (arXiv:2107.03374), equation 1.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
