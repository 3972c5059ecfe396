from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.plugins import HookFailed
from slime.core.sample import Sample, Status
from slime.engine.protocol import GenerateResponse, SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import (
    append_response,
    generate_sample,
    load_generate,
    rollout_sampling_params,
    sampling_seed,
)
from slime.rollout.reward_pool.pool import RewardPool


def _sample(length: int) -> Sample:
    return Sample(tokens=[20] * length, prompt_length=length)


@pytest.mark.parametrize(("prompt", "limit", "expected"), [(30, 40, 10), (30, None, 16), (39, 40, 1), (4, 40, 16)])
def test_responses_end_at_the_context(
    run_with_engines: Callable[..., Any], prompt: int, limit: int | None, expected: int
) -> None:
    args = Args(rollout_max_context_len=limit, rollout_max_response_len=16)

    async def work(context: RolloutContext) -> Sample:
        params = SamplingParams(max_new_tokens=16, ignore_eos=True, sampling_seed=1)
        return await generate_sample(args, _sample(prompt), params, context)

    sample = run_with_engines(args, work)
    assert (sample.response_length, sample.status) == (expected, Status.TRUNCATED)
    assert sample.prompt_tokens == [20] * prompt


def test_an_aborted_sample_keeps_its_tokens(run_with_engines: Callable[..., Any]) -> None:
    async def work(context: RolloutContext) -> Sample:
        params = SamplingParams(max_new_tokens=450, ignore_eos=True)
        task = asyncio.create_task(generate_sample(Args(), _sample(9), params, context))
        while not task.done():
            await asyncio.sleep(0.05)
            await context.engines.abort_all()
        return await task

    sample = run_with_engines(Args(), work)
    sample.check()
    assert sample.status is Status.ABORTED
    assert sample.response_length < 450


def test_each_token_records_the_engines_version(tokenizer: PreTrainedTokenizerFast) -> None:
    def answer(version: str) -> GenerateResponse:
        return GenerateResponse(
            output_ids=[20, 3],
            log_probs=[-1.0, -2.0],
            finish_reason="stop",
            weight_version=version,
            text="",
            prompt_tokens=1,
            completion_tokens=2,
            input_log_probs=[],
        )

    args = Args()
    pool = RewardPool(args)
    context = RolloutContext(args, None, tokenizer, pool)
    for name, version in (("17", 17), ("default", 0)):
        sample = _sample(1)
        append_response(args, sample, answer(name), context, SamplingParams())
        assert sample.policy_versions == [version] * 2
        assert (sample.status, sample.rollout_log_probs) == (Status.COMPLETED, [-1.0, -2.0])
    assert sample.response.endswith("<|user|>")  # special tokens stay in the text that rewards see
    skipping = Args(rollout_skip_special_tokens=True)
    skipped = _sample(1)
    append_response(skipping, skipped, answer("1"), context, SamplingParams())
    assert not skipped.response.endswith("<|user|>")
    assert skipped.response_length == 2


def test_sampling_flags_reach_the_engine() -> None:
    params = rollout_sampling_params(
        Args(rollout_temperature=0.8, rollout_top_k=5, rollout_max_response_len=7, rollout_stop=("\n",))
    )
    assert (params.temperature, params.top_k, params.max_new_tokens, params.stop) == (0.8, 5, 7, ("\n",))
    assert params.to_json()["stop"]


def test_seeds_are_pinned() -> None:
    """A resumed run on another machine samples from the same seeds."""
    assert sampling_seed(42, 0, 7) == 810045072
    seeds = {sampling_seed(42, rollout, index) for rollout in range(20) for index in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_generate_function_has_to_return_the_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    args = Args(custom_generate_function_path="rewards_for_tests.generate_nothing")
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    with pytest.raises(HookFailed, match=r"--custom-generate-function-path.*NoneType"):
        asyncio.run(load_generate(args)(args, _sample(1), SamplingParams(), context))
    with pytest.raises(ValueError, match="--custom-generate-function-path"):
        load_generate(Args(custom_generate_function_path="rewards_for_tests.coin"))


def test_a_replaced_sample_stays_in_its_group(tokenizer: PreTrainedTokenizerFast) -> None:
    args = Args(custom_generate_function_path="rewards_for_tests.generate_anew")
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    given = _sample(1)
    given.group_index, given.index = 5, 41
    made = asyncio.run(load_generate(args)(args, given, SamplingParams(), context))
    assert (made.group_index, made.index) == (5, 41)


def test_sampling_parameters_come_from_the_flags() -> None:
    args = Args(
        rollout_temperature=0.5,
        rollout_top_p=0.9,
        rollout_top_k=0,
        rollout_max_response_len=7,
        rollout_stop=("x",),
        rollout_stop_token_ids=(3,),
        rollout_skip_special_tokens=False,
    )
    assert rollout_sampling_params(args) == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        max_new_tokens=7,
        stop=("x",),
        stop_token_ids=(3,),
        skip_special_tokens=False,
        no_stop_trim=True,
    )
