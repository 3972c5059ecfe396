"""The calculator example and variants of it with engines: turns, aborts, and the fields of each token."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from examples.tool_use.calculator import CALL, OUTPUT, calculate, generate, output_of, without_outputs
from slime.config.args import Args
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext, RolloutResult

PROMPT = "2*3+4=?"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("47*8", 376),
        ("376+35", 411),
        ("2+3*4-5", 9),
        ("9-2*3", 3),
        ("1-2", -1),
        ("7", 7),
        ("2**9", None),
        ("2*", None),
        ("-1", None),
        ("9**9**9**9", None),
        ("1+1+1+1+1", None),
        ("__import__('os').system('true')", None),
        ("1 + 1", None),
        ("", None),
    ],
)
def test_the_calculator_reads_only_arithmetic(expression: str, value: int | None) -> None:
    assert calculate(expression) == value


def test_only_a_call_at_the_end_is_answered() -> None:
    assert output_of("well, calc(2*3)") == "=6;"
    assert output_of("calc(2*x)") == "=?;"
    for text in ("calc(2*3)=6;", "calc(2*3) ", "(2*3)", "calc(2*3", ""):
        assert output_of(text) is None


def begun(tokenizer: PreTrainedTokenizerFast, response: str) -> Sample:
    """Return a sample whose response was sampled by version 3, and then aborted."""
    prompt, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, response))
    assert len(tokens) == len(response)
    sample = Sample(group_index=0, index=0, tokens=prompt + tokens, prompt_length=len(prompt), response=response)
    sample.response_length, sample.status = len(tokens), Status.ABORTED
    if tokens:
        sample.rollout_log_probs, sample.policy_versions = [-1.0] * len(tokens), [3] * len(tokens)
    return sample


def params(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, sampling_seed=1, skip_special_tokens=False, no_stop_trim=True)


def test_tool_tokens_follow_the_call_unsampled(
    run_with_engines: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    call, output = "calc(2*3)", "=6;"

    async def work(context: RolloutContext) -> Sample:
        return await generate(Args(), begun(tokenizer, call), params(60), context)

    sample = run_with_engines(Args(rm_num_workers=1), work)
    sample.check()
    assert sample.response.startswith(call + output)
    assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
    assert len(call + output) < sample.response_length and sample.num_sampled <= 60
    place = slice(len(call), len(call + output))
    assert tokenizer.decode(sample.tokens[sample.prompt_length :][place]) == output
    assert sample.loss_mask[place] == [0, 0, 0]
    assert sample.rollout_log_probs[place] == [0.0, 0.0, 0.0]
    assert sample.policy_versions == [3] * len(call + output) + [0] * (sample.response_length - len(call + output))
    rest = slice(len(call + output), None)
    assert all(value < 0 for value in sample.rollout_log_probs[rest]), "the engine's own"
    # The model is random: whatever it wrote was answered if it was a call, and only then.
    masked = {place for match in OUTPUT.finditer(sample.response) for place in range(*match.span())}
    if "<" not in sample.response:  # one token a character
        assert {place for place, kept in enumerate(sample.loss_mask) if not kept} <= masked


def test_limits_end_the_model_and_the_tool(
    run_with_engines: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The limit is for what the model says: the tool's output counts for the context alone."""

    async def work(context: RolloutContext) -> list[Sample]:
        by_response = [
            await generate(Args(), begun(tokenizer, "calc(2*3)"), params(limit), context) for limit in (9, 10)
        ]
        narrow = Args(rollout_max_context_len=len(PROMPT) + len("calc(2*3)=6;"))
        return [
            *by_response,
            await generate(narrow, begun(tokenizer, "calc(2*3)"), params(60), replace(context, args=narrow)),
        ]

    over, fits, without_room = run_with_engines(Args(rm_num_workers=1), work)
    assert (over.status, over.response_length) == (Status.TRUNCATED, 12)
    assert tokenizer.decode(over.tokens[over.prompt_length :]) == "calc(2*3)=6;"
    assert (fits.response_length, fits.num_sampled) == (13, 10), "one token of the model's after the output"
    assert (without_room.status, without_room.response_length) == (Status.TRUNCATED, 9)
    for sample in (over, fits, without_room):
        sample.check()


def test_an_aborted_sample_continues(run_with_engines: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    args = Args(rollout_max_response_len=450)

    async def work(context: RolloutContext) -> tuple[list[int], list[int], list[Status], Sample]:
        for _ in range(10):  # on a busy machine a response may be whole before it is aborted
            found = await cut_off(context)
            if found[2][0] is Status.ABORTED:
                break
        return found

    async def cut_off(context: RolloutContext) -> tuple[list[int], list[int], list[Status], Sample]:
        sample = begun(tokenizer, "calc(2*3)")
        statuses = []
        first: list[int] = []
        while sample.status is Status.ABORTED:
            task = asyncio.ensure_future(generate(args, sample, params(450), context))
            await asyncio.sleep(0.05)
            while not task.done() and len(statuses) < 3:
                await context.engines.abort_all()
                await asyncio.sleep(0.01)
            sample = await task
            statuses.append(sample.status)
            first = first or list(sample.tokens)
        return first, sample.tokens, statuses, sample

    first, tokens, statuses, sample = run_with_engines(Args(rm_num_workers=1), work)
    assert statuses[0] is Status.ABORTED, "it was cut off at least once"
    assert tokens[: len(first)] == first
    assert sample.response.startswith("calc(2*3)=6;")
    assert "=6;=6;" not in sample.response, "an answered call is not answered again"
    assert sample.loss_mask[:12] == [1] * 9 + [0] * 3
    sample.check()


def test_demonstrations_teach_no_output() -> None:
    text = "calc(4*8)=32;calc(32+5)=37;</think>\\boxed{37}<|user|>"
    length = text.index("</think>") + 1 + len("\\boxed{37}") + 1
    sample = Sample(group_index=0, index=0, tokens=[0] * (length + 1), prompt_length=1, response_length=length)
    sample.response, sample.reward = text, 0.0
    mask = without_outputs(Args(), [sample]).columns["loss_mask"].astype(int).tolist()
    shown = "".join("#" if not kept else character for kept, character in zip(mask, text, strict=False))
    assert shown.startswith("calc(4*8)####calc(32+5)####<")
    assert mask[text.index("</think>") :] == [1] * (length - text.index("</think>"))
    assert CALL.findall(text) == ["4*8", "32+5"]


def test_the_examples_around_a_rollout(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = data_file([{"prompt": f"{'q' * (9 - number)}", "label": "1"} for number in range(8)])
    hooks = {
        "rollout_function_path": "examples.hooks.rollouts.count_right",
        "eval_function_path": "examples.hooks.rollouts.evaluate_twice",
        "data_source_path": "examples.hooks.rollouts.EasyFirst",
        "custom_generate_function_path": "examples.tool_use.calculator.generate",
        "custom_rm_path": "examples.rewards.own_rewards.short_and_right",
    }
    args = Args(
        prompt_data=path,
        label_key="label",
        rollout_batch_size=4,
        n_samples_per_prompt=2,
        over_sampling_batch_size=4,
        rollout_max_response_len=40,
        rm_num_workers=1,
        eval_prompt_data=("few", f"{path}@[:3]"),
        eval_input_key="prompt",
        eval_label_key="label",
        eval_max_response_len=40,
        eval_temperature=1.0,
        eval_top_p=1.0,
        eval_top_k=-1,
        **hooks,
    )
    source = load_hook("data_source_path", args.data_source_path)(args, tokenizer)

    async def work(context: RolloutContext) -> tuple[RolloutResult, dict[str, float]]:
        result = await load_hook("rollout_function_path", args.rollout_function_path)(args, 0, source, context)
        return result, await load_hook("eval_function_path", hooks["eval_function_path"])(args, 0, context)

    result, metrics = run_with_engines(args, work)
    samples = [sample for group in result.groups for sample in group]
    assert result.metrics["rollout/num_right"] == sum("1" in sample.response for sample in samples)
    assert metrics["eval/few/num_prompts"] == 3
    drawn = source.get_groups(4, rollout_id=1)
    assert [len(re.findall("q", str(group[0].prompt))) for group in drawn] == [2, 3, 4, 5]
