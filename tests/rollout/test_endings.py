"""A response ends at its stop token or stop text, whatever finish reason the engine gives for a part."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.engine.protocol import FinishReason, GenerateResponse, SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.endings import cut_at_stop_across_parts
from slime.rollout.generate import append_response, generate_sample, room
from slime.rollout.reward_pool.pool import RewardPool

WORDS = ["ab", "cd", "x|y", "<eos>", "<other>", "é"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer with tokens of several characters, by their index in WORDS."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="ab"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def ended(context: RolloutContext, params: SamplingParams, reason: FinishReason, *words: str, **fields: Any) -> Sample:
    """Return a sample after an answer of these words."""
    sample = Sample(tokens=[0], prompt_length=1, **fields)
    tokens = [WORDS.index(word) for word in words]
    counts: dict[str, Any] = {"prompt_tokens": 1, "completion_tokens": len(tokens), "input_log_probs": []}
    answer = GenerateResponse(
        output_ids=tokens, log_probs=[-1.0] * len(tokens), finish_reason=reason, weight_version="1", text="", **counts
    )
    append_response(Args(), sample, answer, context, params)
    return sample


@pytest.mark.parametrize("reason", ["length", "abort", "stop"])
@pytest.mark.parametrize(
    ("tokens", "params"),
    [
        (["ab", "<eos>"], {}),
        (["ab", "<other>"], {}),  # generation_config.json names it
        (["ab", "cd"], {"stop_token_ids": [1]}),
        (["ab", "cd"], {"stop": "bc"}),  # within the last two tokens
        (["ab", "x|y"], {"stop": ("no", "|")}),  # in the middle of the last token
        (["cd"], {"stop": "cd"}),  # the whole response
        (["<eos>", "x|y"], {"stop": "|", "ignore_eos": True}),
    ],
)
def test_a_part_that_ends_the_response_completes_it(
    words: PreTrainedTokenizerFast, tmp_path: Path, tokens: list[str], params: dict[str, Any], reason: FinishReason
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [WORDS.index("<other>")]}))
    args = Args(hf_checkpoint=str(tmp_path))
    context = RolloutContext(args, None, words, RewardPool(args))
    assert ended(context, SamplingParams(**params), reason, *tokens).status is Status.COMPLETED


@pytest.mark.parametrize(
    ("tokens", "params"),
    [
        ([], {}),
        (["ab", "cd"], {}),
        (["<eos>", "ab"], {}),  # the end of an earlier turn
        (["<eos>"], {"ignore_eos": True}),
        (["cd"], {"ignore_eos": True, "stop_token_ids": [1]}),  # SGLang's ignore_eos applies to both
        (["x|y", "ab"], {"stop": "|"}),  # it came with the token before
        (["ab", "cd"], {"stop": "da"}),
    ],
)
def test_other_parts_leave_the_response_open(
    words: PreTrainedTokenizerFast, tokens: list[str], params: dict[str, Any]
) -> None:
    context = RolloutContext(Args(), None, words, RewardPool(Args()))
    reasons: dict[FinishReason, Status] = {"length": Status.TRUNCATED, "abort": Status.ABORTED}
    for reason, status in reasons.items():
        assert ended(context, SamplingParams(**params), reason, *tokens).status is status


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        (("ab",), 3),  # a tool wrote it, all of it before this part
        (("bc",), 1),
        (("bcdc",), 2),
        (("no", "bcdcdcd"), 3),
        (("dc",), 3),  # inside this part: the engine's work
    ],
)
def test_stop_texts_that_began_in_the_part_before(
    words: PreTrainedTokenizerFast, stops: tuple[str, ...], kept: int
) -> None:
    context = RolloutContext(Args(), None, words, RewardPool(Args()))
    sample = Sample(tokens=[3, 0], prompt_length=1, response_length=1, loss_mask=[0])
    counts: dict[str, Any] = {"prompt_tokens": 2, "completion_tokens": 3, "input_log_probs": []}
    part = GenerateResponse(
        output_ids=[1, 1, 1],
        log_probs=[-1.0, -2.0, -3.0],
        finish_reason="length",
        weight_version="1",
        text="",
        **counts,
    )
    found = cut_at_stop_across_parts(sample, part, stops, context)
    assert (found.output_ids, found.log_probs) == ([1] * kept, [-1.0, -2.0, -3.0][:kept])
    assert found.finish_reason == ("length" if stops in (("ab",), ("dc",)) else "stop")


def test_a_stop_text_may_be_a_space() -> None:
    """Tokenizers of SentencePiece's kind drop the space at the beginning of a text, so one more token is decoded."""
    inner = Tokenizer(models.WordLevel({"ab": 0, "▁cd": 1}, unk_token="ab"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    context = RolloutContext(Args(), None, tokenizer, RewardPool(Args()))
    assert ended(context, SamplingParams(stop=" "), "length", "ab", "cd").status is Status.COMPLETED
    assert ended(context, SamplingParams(stop="  "), "length", "ab", "cd").status is Status.TRUNCATED


def test_a_sample_that_ended_sends_no_request(words: PreTrainedTokenizerFast) -> None:
    """An earlier version left it aborted after its end; there is no engine here that could get a request."""
    context = RolloutContext(Args(), None, words, RewardPool(Args()))
    for last, mask, ends in (("<eos>", None, True), ("<eos>", [1, 1], True), ("<eos>", [1, 0], False)):
        sample = Sample(tokens=[0, 1, WORDS.index(last)], prompt_length=1, response_length=2, status=Status.ABORTED)
        sample.loss_mask = mask
        going_on = generate_sample(Args(), sample, SamplingParams(max_new_tokens=9), context)
        if ends:
            assert asyncio.run(going_on).status is Status.COMPLETED
        else:  # control: a tool wrote the text, so the response continues
            with pytest.raises(ValueError, match="without engines"):
                asyncio.run(going_on)


def test_a_response_ends_under_sglangs_order_of_checks(
    run_with_engines: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A part is cut exactly at a stop token or a stop text; the response's own limit may be at the same token."""
    args = Args()
    free = SamplingParams(max_new_tokens=40, sampling_seed=3, ignore_eos=True, no_stop_trim=True)

    async def work(context: RolloutContext) -> list[tuple[int, Sample]]:
        async def make(params: SamplingParams) -> Sample:
            return await generate_sample(args, Sample(tokens=[20] * 5, prompt_length=5), params, context)

        whole = await make(free)
        response = whole.tokens[whole.prompt_length :]
        place = next(i for i in range(8, 40) if response[i] not in response[:i])
        by_token = {"ignore_eos": False, "stop_token_ids": [response[place]]}
        by_text = {"stop": tokenizer.decode(response[place : place + 1])}
        cut = replace(free, max_new_tokens=place + 1)
        return [(place + 1, await make(replace(cut, **stops))) for stops in (by_token, by_text, {})]

    *cut, (length, control) = run_with_engines(args, work)
    for count, sample in cut:
        assert (sample.response_length, sample.status) == (count, Status.COMPLETED)
    assert (control.response_length, control.status) == (length, Status.TRUNCATED)


@pytest.mark.parametrize(
    ("flags", "tokens", "left"),
    [
        ({}, 90, 8),  # SGLang fills 98 of 100 positions
        ({}, 93, 5),
        ({}, 94, 0),  # and refuses this input
        ({"rollout_max_context_len": 95}, 94, 0),
        ({"rollout_max_context_len": 94}, 90, 4),
    ],
)
def test_nothing_is_sent_that_an_engine_would_refuse(flags: dict[str, Any], tokens: int, left: int) -> None:
    args = Args(sglang={"context_length": 100}, **flags)
    sample = Sample(tokens=[1] * tokens, prompt_length=5, response_length=tokens - 5)
    assert room(args, sample, 1000) == left


@pytest.mark.parametrize(("tokens", "made"), [(505, 5), (506, 0)])
def test_parts_near_the_context_limit_are_cut(run_with_engines: Callable[..., Any], tokens: int, made: int) -> None:
    """The engines here have a context of 512 tokens, and SGLang's limits."""
    args = Args(sglang={"context_length": 512})
    sample = Sample(tokens=[20] * tokens, prompt_length=5, response_length=tokens - 5, status=Status.ABORTED)

    async def work(context: RolloutContext) -> Sample:
        params = SamplingParams(max_new_tokens=1000, ignore_eos=True)
        if not made:  # control: a request that does not respect the limit is refused
            with pytest.raises(EngineError, match="maximum allowed length"):
                await generate_sample(Args(), sample.copy(), replace(params, max_new_tokens=tokens - 4), context)
        return await generate_sample(args, sample, params, context)

    done = run_with_engines(args, work)
    assert (len(done.tokens) - tokens, done.status) == (made, Status.TRUNCATED)
