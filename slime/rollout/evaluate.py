"""Evaluation: sample and judge every prompt of every data set, and report the mean reward with its standard error.

- Called by: the training loop before the first rollout, every --eval-interval rollouts and after the last.
- Invariant: the prompts and the seeds are the same every time, whatever the training prompts were. Nothing from an
  evaluation goes into training.
"""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from slime.config.args import Args
from slime.config.context import rollout_limits
from slime.config.eval_data import EvalDataset, eval_datasets
from slime.config.prompt_format import PromptFormat
from slime.core.about import about
from slime.core.failure_log import FailureLog
from slime.core.plugins import HookFailed
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.observability.progress import SampleProgress
from slime.rollout.context import RolloutContext, gather_or_cancel, request_slots
from slime.rollout.generate import load_generate, rollout_sampling_params, sampling_seed
from slime.rollout.metrics import entry_metrics, sample_metrics, verdict_metrics
from slime.rollout.prompts import Prompt, PromptSet, load_prompts
from slime.rollout.reward_pool.verdict import check_own_reward
from slime.rollout.rewards.reward import reward_of, reward_type
from slime.rollout.sample_failures import ENGINE_FAILED, HOOK_FAILED
from slime.rollout.sample_log import SampleLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_MAX_ABORTS = 100
"""The most requests for one response: a rollout in flight aborts all requests once it is full; ours are sent again."""


class Evaluator:
    """Holds the data sets, tokenized once."""

    def __init__(self, args: Args, tokenizer: PreTrainedTokenizerBase, answers: SampleLog | None = None) -> None:
        """`answers` gets every answer of every evaluation; None: they are not written anywhere."""
        self._args = args
        self._answers = answers
        self._data: list[tuple[EvalDataset, PromptSet]] = []
        longest = rollout_limits(args).request
        for dataset in eval_datasets(args):
            form = PromptFormat.of(dataset)
            data = load_prompts(dataset.path, args, tokenizer, dataset.keys, longest=longest, form=form)
            self._data.append((dataset, data))

    async def run(self, rollout_id: int, context: RolloutContext) -> dict[str, float]:
        """Evaluate all data sets at once with the engines' present weights; return metrics `eval/<name>/...`.

        A data set without a single judged response has no reward; an error is logged.
        """
        slots = await request_slots(self._args, context)
        total = sum(len(data.prompts) * dataset.n_samples_per_eval_prompt for dataset, data in self._data)
        ended: list[Sample] = []
        begin = time.monotonic()

        def progress() -> SampleProgress:
            tokens = sum(sample.response_length for sample in ended)
            return SampleProgress(total, len(ended), len(ended), tokens, seconds=time.monotonic() - begin)

        with context.progress.evaluation(progress):
            results = await asyncio.gather(
                *(self._run_dataset(dataset, data, rollout_id, context, slots, ended) for dataset, data in self._data)
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
        ended: list[Sample],
    ) -> dict[str, float]:
        """Evaluate one data set, and add each sample to `ended`, which only counts them."""
        start = time.perf_counter()
        args = replace(self._args, use_routing_replay=False)  # nothing is trained on these
        count = dataset.n_samples_per_eval_prompt
        generate = load_generate(args)
        failures = FailureLog(logger)
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
                        with about(f"{dataset.name} sample {sample.index}"):
                            sample = await generate(args, sample, replace(params, sampling_seed=seed), context)
                        if sample.status is not Status.ABORTED:
                            break
                except EngineError as error:
                    return sample.to_failed(f"{ENGINE_FAILED}: {error}")
                except HookFailed as error:
                    failures.add(f"evaluation on {dataset.name}, sample {sample.index}", error.__cause__ or error)
                    return sample.to_failed(f"{HOOK_FAILED}: {error}")
            check_own_reward(sample, args.reward_key)
            if sample.status is Status.ABORTED:
                sample.reward_failure = f"aborted by the engine, {_MAX_ABORTS} times"
            elif sample.reward is None and sample.reward_failure is None and not context.rewards.by_group:
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
            ended.extend(samples)
            if context.rewards.by_group:
                await context.rewards.judge_group(samples)
            return samples

        groups = await gather_or_cancel([run_group(number, prompt) for number, prompt in enumerate(data.prompts)])
        metrics = {**eval_metrics(args, dataset, groups), "time": time.perf_counter() - start}
        if self._answers is not None:
            await self._answers.evaluation(rollout_id, dataset.name, groups)
        return metrics


def eval_metrics(args: Args, dataset: EvalDataset, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Return the metrics of one data set; a group holds the responses to one prompt.

    Lengths and `format` are computed over the judged responses. A failed response counts as wrong in `reward` and
    pass@k (see `rewards_by_prompt`). `reward_judged` leaves it out, and with --eval-failed-as excluded so does every
    metric. If all responses failed, there are no metrics of rewards, and an error is logged.

    `format` is the share of responses from which deepscaler reads an answer; only data sets that deepscaler judges have
    it. pass@k needs a reward to mean right or wrong, so it exists only if all rewards are 0 or 1, or all -1 or 1.
    """
    samples = [sample for group in groups for sample in group]
    judged = [sample for sample in samples if sample.reward is not None]
    metrics: dict[str, float] = {"num_prompts": len(groups), "failed": 1 - len(judged) / len(samples)}
    if not judged:
        logger.error(
            "evaluation on %s: none of %d responses was judged, so it has no reward; the first: %s",
            dataset.name,
            len(samples),
            samples[0].reward_failure,
        )
        return metrics
    if len(judged) < len(samples):
        first = next(sample for sample in samples if sample.reward is None)
        logger.warning("evaluation on %s: %d of %d responses failed, the first: %s", dataset.name,
                       len(samples) - len(judged), len(samples), first.reward_failure)  # fmt: skip
    rewards = rewards_by_prompt(args, dataset, groups)
    only_judged = rewards_by_prompt(args, replace(dataset, failed_as="excluded"), groups)
    metrics |= _mean_over_prompts("reward", rewards) | _mean_over_prompts("reward_judged", only_judged)
    metrics |= entry_metrics(judged, args.reward_key) | verdict_metrics(judged) | sample_metrics(judged)
    types = [reward_type(args, sample, dataset.rm_type) for sample in judged]
    found = [_answer_found(rm_type, sample.response) for rm_type, sample in zip(types, judged, strict=True)]
    if None not in found:
        metrics["format"] = statistics.fmean(map(bool, found))
    values = {reward for of_prompt in rewards for reward in of_prompt}
    if values <= {0, 1} or values <= {-1, 1}:
        for k in dataset.pass_at_ks:
            chances = [
                [pass_at_k(len(of_prompt), sum(reward == 1 for reward in of_prompt), k)]
                for of_prompt in rewards
                if len(of_prompt) >= k
            ]
            if chances:
                metrics |= _mean_over_prompts(f"pass@{k}", chances)
    return metrics


def _answer_found(rm_type: str | None, response: str) -> bool | None:
    """Return whether the reward finds an answer in the response; None if it does not report this."""
    reward = reward_of(rm_type)
    return reward.read(response) is not None if reward is not None and reward.reports_format else None


def rewards_by_prompt(args: Args, dataset: EvalDataset, groups: Sequence[Sequence[Sample]]) -> list[list[float]]:
    """Return the rewards of each prompt's responses; a failed one gets the reward that its judge gives a wrong answer.

    A failed response is left out with --eval-failed-as excluded, and, with a warning, if that reward is not known.
    """
    judged = [sample.reward_value(args.reward_key) for group in groups for sample in group if sample.reward is not None]
    unknown = 0
    rewards: list[list[float]] = []
    for group in groups:
        of_prompt: list[float] = []
        for sample in group:
            if sample.reward is not None:
                of_prompt.append(sample.reward_value(args.reward_key))
            elif dataset.failed_as == "wrong":
                reward = reward_of(reward_type(args, sample, dataset.rm_type))
                lowest = lowest_reward(judged) if reward is None else reward.lowest
                of_prompt += [] if lowest is None else [lowest]
                unknown += lowest is None
        rewards.append(of_prompt)
    if unknown:
        logger.warning(
            "evaluation on %s: %d failed responses are left out of its reward: the others have rewards from %g to %g, "
            "and only for rewards between 0 and 1, or -1 and 1, is it known which one means a wrong answer",
            dataset.name,
            unknown,
            min(judged),
            max(judged),
        )
    return rewards


def lowest_reward(rewards: Collection[float]) -> float | None:
    """Infer from `rewards` what their function gives for a wrong answer; None if they do not show it."""
    if all(0 <= reward <= 1 for reward in rewards):
        return 0.0
    return -1.0 if all(-1 <= reward <= 1 for reward in rewards) else None


def _mean_over_prompts(name: str, by_prompt: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean and its standard error over prompts: the responses to one prompt count as one value."""
    values = [statistics.fmean(of_prompt) for of_prompt in by_prompt if of_prompt]
    mean = {name: statistics.fmean(values)}
    if len(values) > 1:
        mean[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(len(values))
    return mean


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that one of k responses, drawn from the n seen without replacement, is right.

    The value is 1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al., "Evaluating large language models
    trained on code", 2021 (arXiv:2107.03374), equation 1.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
