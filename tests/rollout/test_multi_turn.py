"""Several turns in one response: masks, limits, messages, aborts inside a turn, and resumed samples."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import turn_hooks_for_tests
from scripted_engine import END, ScriptedEngine
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import MULTI_TURN, Sample, Status
from slime.engine.protocol import SamplingParams
from slime.rollout.chat_template import render_messages
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.multi_turn import append_environment, append_messages, last_turn, messages_of
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.tokenizer import tokenize

Write = Callable[..., str]
MESSAGES = [{"role": "user", "content": "play"}]


def context_of(args: Args, tokenizer: PreTrainedTokenizerFast) -> RolloutContext:
    return RolloutContext(args, ScriptedEngine(), tokenizer, RewardPool(args), 1)  # pyright: ignore[reportArgumentType]


def sample_of(tokenizer: PreTrainedTokenizerFast, said: str, *, ended: bool = True) -> Sample:
    [prompt] = tokenize(tokenizer, [render_messages(tokenizer, MESSAGES, None)], add_special_tokens=False)
    [tokens] = tokenize(tokenizer, [said], add_special_tokens=False)
    tokens = [*tokens, END] if ended else tokens
    return Sample(
        prompt=MESSAGES,
        tokens=[*prompt, *tokens],
        prompt_length=len(prompt),
        response_length=len(tokens),
        rollout_log_probs=[-1.0] * len(tokens),
        policy_versions=[4] * len(tokens),
        status=Status.COMPLETED,
    )


def test_an_environments_tokens_are_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    context = context_of(Args(), tokenizer)
    sample = sample_of(tokenizer, "calc(1)", ended=False)
    assert append_environment(sample, "=6;", context)
    assert sample.response == "calc(1)=6;"
    assert sample.loss_mask == [1] * 7 + [0] * 3
    assert sample.rollout_log_probs == [-1.0] * 7 + [0.0] * 3
    assert sample.policy_versions == [4] * 10
    assert (sample.num_sampled, sample.response_length) == (7, 10)
    assert sample.metadata[MULTI_TURN]["num"] == 2
    assert last_turn(sample, context) == ""
    assert sample.to_bare_prompt().metadata == {}, "a response that starts again has no turns"
    first = Sample(tokens=[7], prompt_length=1)
    assert append_environment(first, "ab", context)
    assert (first.policy_versions, first.rollout_log_probs) == ([1, 1], [0.0, 0.0])
    assert first.metadata.get(MULTI_TURN) is None, "the model has not had a turn"


@pytest.mark.parametrize("ended", [True, False])
def test_messages_continue_as_the_template_renders(tokenizer: PreTrainedTokenizerFast, ended: bool) -> None:
    """The tokens are those of the whole conversation rendered at once, also for a second round of messages."""
    context = context_of(Args(), tokenizer)
    sample = sample_of(tokenizer, "5", ended=ended)
    assert append_messages(sample, [{"role": "user", "content": "higher"}], context)
    if ended:
        text = tokenizer.decode(sample.tokens)
        assert text == "[gMASK]<sop><|user|>\nplay<|assistant|>\n<think>5<|user|>\nhigher<|assistant|>\n<think>"
    sample.tokens, sample.response_length = [*sample.tokens, 40, END], sample.response_length + 2
    assert sample.loss_mask and sample.rollout_log_probs and sample.policy_versions
    sample.loss_mask, sample.rollout_log_probs = [*sample.loss_mask, 1, 1], [*sample.rollout_log_probs, -1.0, -1.0]
    sample.policy_versions = [*sample.policy_versions, 5, 5]
    assert append_messages(sample, [{"role": "user", "content": "lower"}], context)
    assert [message["content"] for message in messages_of(sample)] == [
        "play",
        "5",
        "higher",
        tokenizer.decode([40]),
        "lower",
    ]
    assert sample.loss_mask[-1] == 0 and sample.policy_versions[-1] == 5
    assert sample.metadata[MULTI_TURN]["num"] == 3


def test_what_cannot_be_appended(tokenizer: PreTrainedTokenizerFast) -> None:
    context = context_of(Args(), tokenizer)
    plain = Sample(index=3, prompt="text", tokens=[1, 2], prompt_length=1, response_length=1)
    with pytest.raises(ValueError, match=r"sample 3: its prompt is a text.*--apply-chat-template"):
        append_messages(plain, MESSAGES, context)
    narrow = context_of(Args(rollout_max_context_len=10), tokenizer)
    sample = Sample(tokens=[1] * 7, prompt_length=4, response_length=3)
    assert not append_environment(sample, "abc", narrow), "a token of the model's has to fit, too"
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, 3)
    assert append_environment(sample, "ab", narrow)


def run_args(write: Write, function: str, **flags: Any) -> Args:
    defaults: dict[str, Any] = {
        "prompt_data": write([{"prompt": f"question {number}"} for number in range(9)]),
        "apply_chat_template": True,
        "rollout_batch_size": 1,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 40,
        "deterministic": True,
        "custom_generate_function_path": f"turn_hooks_for_tests.{function}",
    }
    return Args(**{**defaults, **flags})


async def play(
    args: Args, tokenizer: PreTrainedTokenizerFast, meanwhile: Callable[[ScriptedEngine], Any], buffer: DataBuffer
) -> RolloutResult:
    context = context_of(args, tokenizer)
    engine: Any = context.client
    task = asyncio.create_task(generate_rollout(args, 0, buffer, context))
    while not task.done():
        await asyncio.sleep(0.001)
        meanwhile(engine)
    return await task


def to_the_end(engine: ScriptedEngine) -> None:
    while engine.in_flight:
        engine.advance(0, 100)


def samples_of(result: RolloutResult) -> list[Sample]:
    return [sample for group in result.groups for sample in group]


@pytest.mark.parametrize(("function", "turns"), [("echo", 3), ("slow", 3), ("short", 2)])
def test_an_environment_plays_its_turns(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, function: str, turns: int
) -> None:
    args = run_args(data_file, function, custom_rm_path="rewards_for_tests.coin" if function == "short" else None)
    result = asyncio.run(play(args, tokenizer, to_the_end, DataBuffer(args, tokenizer)))
    assert result.metrics["rollout/num_turns"] == turns
    for sample in samples_of(result):
        assert sample.status is Status.COMPLETED
        assert len(sample.metadata[MULTI_TURN]["state"]["said"]) == turns
        for turn in range(1, turns):
            assert f"<|user|>\nturn {turn}<|assistant|>" in sample.response
        assert sample.num_sampled < sample.response_length
        assert sample.loss_mask is not None and sample.loss_mask[0] == sample.loss_mask[-1] == 1


def test_the_environment_does_not_eat_the_limit(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """The limit is for what the model says; control: the environment alone has more tokens than the limit."""
    args = run_args(data_file, "echo", rollout_max_response_len=9)
    result = asyncio.run(play(args, tokenizer, to_the_end, DataBuffer(args, tokenizer)))
    for sample in samples_of(result):
        assert sample.num_sampled <= 9
        assert sample.reward is not None, "the environment judges what is truncated, too"
        assert sample.status is (
            Status.TRUNCATED if sample.num_sampled == 9 and sample.tokens[-1] != END else Status.COMPLETED
        )
    assert max(sample.response_length - sample.num_sampled for sample in samples_of(result)) > 9


def test_parts_of_turns_add_up(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """Aborts in every place (in a turn, between turns, while a tool works) change no token, text or state."""

    def whole(function: str, meanwhile: Callable[[ScriptedEngine], Any], **flags: Any) -> list[Sample]:
        args = run_args(data_file, function, **flags)
        return samples_of(asyncio.run(play(args, tokenizer, meanwhile, DataBuffer(args, tokenizer))))

    aborted: list[int] = []

    def in_parts(engine: ScriptedEngine) -> None:
        aborted.append(len(engine.in_flight))
        for place in range(len(engine.in_flight) - 1, -1, -1):
            engine.advance(place, 1)
        if engine.in_flight:
            asyncio.ensure_future(engine.abort_all())  # noqa: RUF006 (it does not wait)

    unbroken = whole("echo", to_the_end)
    for function in ("echo", "slow"):
        for flags in ({}, {"partial_rollout": True, "partial_rollout_max_tokens": 3}):
            for sample, other in zip(unbroken, whole(function, in_parts, **flags), strict=True):
                assert sample.tokens == other.tokens
                assert sample.loss_mask == other.loss_mask
                assert sample.rollout_log_probs == other.rollout_log_probs
                assert sample.metadata[MULTI_TURN] == other.metadata[MULTI_TURN]
                assert sample.reward == other.reward is not None
    assert sum(aborted) > 50, "control: many requests were cut off"


def test_a_saved_sample_goes_on_in_its_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """A sample that is saved while a tool works goes on with the same turn in another process."""
    from turn_hooks_for_tests import slow

    params = SamplingParams(max_new_tokens=40, sampling_seed=7, no_stop_trim=True)

    async def begin() -> dict[str, Any]:
        context = context_of(Args(), tokenizer)
        engine: Any = context.client
        sample = sample_of(tokenizer, "", ended=False)
        sample.status = Status.PENDING
        task = asyncio.create_task(slow(Args(), sample, params, context))
        await asyncio.sleep(0)
        engine.advance(0, 100)
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert sample.status is Status.ABORTED, "not complete: its turn has no answer"
        return sample.to_dict()

    async def go_on(saved: dict[str, Any]) -> Sample:
        context = context_of(Args(), tokenizer)
        task = asyncio.create_task(slow(Args(), Sample.from_dict(saved), params, context))
        while not task.done():
            await asyncio.sleep(0.001)
            to_the_end(context.client)  # pyright: ignore[reportArgumentType]
        return await task

    sample = asyncio.run(go_on(asyncio.run(begin())))
    assert (sample.status, sample.metadata[MULTI_TURN]["num"]) == (Status.COMPLETED, 3)
    assert len(sample.metadata[MULTI_TURN]["state"]["said"]) == 3


def test_a_failing_environment_is_called_once(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its turn was not cut off by an abort, so the sample has failed at once."""
    turn_hooks_for_tests.CALLS.clear()
    args = run_args(data_file, "failing")
    with pytest.raises(RuntimeError, match=r"2 of 2 samples were not generated, .*KeyError: 'tool'"):
        asyncio.run(play(args, tokenizer, to_the_end, DataBuffer(args, tokenizer)))
    assert sorted(turn_hooks_for_tests.CALLS) == [1, 1, 2, 2]
