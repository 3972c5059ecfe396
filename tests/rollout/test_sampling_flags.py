"""Every sampling flag, from the command line to real engines: tokens, log-probs and text agree."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rollout_hooks_for_tests
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.parse import parse_args
from slime.core.sample import Sample, Status
from slime.engine.client import EngineClient
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.evaluate import Evaluator
from slime.rollout.reward_pool.pool import RewardPool

NUM_SAMPLES = 16


@pytest.fixture
def parse(model_dir: Path, data_file: Callable[..., str]) -> Callable[..., Args]:
    """Return the args of a run over four prompts, with more flags."""
    data = data_file([{"prompt": f"question {number}", "label": str(number)} for number in range(4)])

    def parse(*words: str) -> Args:
        return parse_args(
            [
                *("--hf-checkpoint", str(model_dir), "--ref-load", str(model_dir), "--prompt-data", data),
                *("--label-key", "label", "--rm-type", "random", "--rm-num-workers", "1", "--num-rollout", "1"),
                *("--rollout-batch-size", "4", "--n-samples-per-prompt", str(NUM_SAMPLES // 4)),
                *("--rollout-engine", "embedded", "--rollout-num-gpus", "2", "--rollout-max-response-len", "60"),
                *(word.replace("DATA", data) for word in words),
            ]
        )

    return parse


@pytest.fixture(scope="module")
def run(router_url: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., Any]]:
    """Return a function that runs `async work(context)`; all its calls share a loop and a worker for rewards."""
    rewards = RewardPool(Args(rm_type="random", rm_num_workers=1))

    async def with_client(args: Args, work: Callable[[RolloutContext], Awaitable[Any]]) -> Any:
        async with EngineClient(router_url, request_timeout=60) as client:
            return await work(RolloutContext(args, client, tokenizer, rewards))

    with asyncio.Runner() as runner:
        yield lambda args, work: runner.run(with_client(args, work))
        rewards.close()


@pytest.fixture
def sample_all(
    parse: Callable[..., Args], run: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., list[Sample]]:
    """Run one rollout with the flags; check that tokens, log-probs and text of its samples belong together."""

    def sample_all(*words: str) -> list[Sample]:
        args = parse(*words)
        buffer = DataBuffer(args, tokenizer)

        async def work(context: RolloutContext) -> list[Sample]:
            result = await generate_rollout(args, 0, buffer, context)
            return [sample for group in result.groups for sample in group]

        samples = run(args, work)
        assert len(samples) == NUM_SAMPLES
        for sample in samples:
            sample.check()
            assert len(sample.rollout_log_probs) == sample.response_length == len(_response(sample)) > 0
            text = tokenizer.decode(_response(sample), skip_special_tokens=args.rollout_skip_special_tokens)
            assert text == sample.response
        return samples

    return sample_all


def _response(sample: Sample) -> list[int]:
    return sample.tokens[sample.prompt_length :]


def _responses(samples: list[Sample]) -> list[list[int]]:
    return [_response(sample) for sample in samples]


def test_stop_strings_end_a_response_and_stay(
    sample_all: Callable[..., list[Sample]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The stop text is part of the response, with the whole token that contains it: that is what is trained on."""

    def has_stop(tokens: list[int]) -> bool:
        return bool(set("ab") & set(tokenizer.decode(tokens)))

    free, samples = sample_all(), sample_all("--rollout-stop", "a", "b")
    assert any(has_stop(_response(sample)[:-1]) for sample in free), "the control continues after them"
    stopped = [sample for sample in samples if has_stop(_response(sample))]
    assert len(stopped) > NUM_SAMPLES // 4
    assert {sample.status for sample in stopped} == {Status.COMPLETED}
    assert any(sample.response.endswith("|>") for sample in stopped), "in the middle of a token"
    for sample, unstopped in zip(samples, free, strict=True):
        assert not has_stop(_response(sample)[:-1])
        assert _response(sample) == _response(unstopped)[: sample.response_length], "the same tokens, only fewer"


def test_stop_token_ids_end_responses_and_stay(
    sample_all: Callable[..., list[Sample]], tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("c", "<think>")]
    assert any(set(ids) & set(response[:-1]) for response in _responses(sample_all()))
    samples = sample_all("--rollout-stop-token-ids", *map(str, ids))
    stopped = [sample for sample in samples if sample.tokens[-1] in ids]
    assert len(stopped) > NUM_SAMPLES // 4
    assert not any(set(ids) & set(response[:-1]) for response in _responses(samples))
    assert {sample.status for sample in stopped} == {Status.COMPLETED}


def test_lengths(sample_all: Callable[..., list[Sample]]) -> None:
    samples = sample_all("--rollout-max-response-len", "5")
    assert max(sample.response_length for sample in samples) == 5
    samples = sample_all("--rollout-max-context-len", "20")
    assert max(len(sample.tokens) for sample in samples) == 20
    cut = [sample for sample in samples if sample.response_length == 20 - sample.prompt_length]
    assert Status.TRUNCATED in {sample.status for sample in cut}


def test_temperature_and_seed(sample_all: Callable[..., list[Sample]]) -> None:
    first = sample_all("--rollout-seed", "7")
    assert _responses(sample_all("--rollout-seed", "7")) == _responses(first)
    assert _responses(sample_all("--rollout-seed", "8")) != _responses(first)
    assert len({tuple(response) for response in _responses(first)}) == NUM_SAMPLES
    greedy = _responses(sample_all("--rollout-temperature", "0"))
    assert len({tuple(response) for response in greedy}) <= 4, "one a prompt"


def test_top_p_and_top_k_without_training(sample_all: Callable[..., list[Sample]]) -> None:
    greedy = _responses(sample_all("--rollout-temperature", "0"))
    assert _responses(sample_all("--debug-rollout-only", "--rollout-top-k", "1")) == greedy
    assert _responses(sample_all("--debug-rollout-only", "--rollout-top-p", "1e-9")) == greedy
    assert _responses(sample_all("--rollout-top-k", "0")) == _responses(sample_all()) != greedy


def test_special_tokens_may_be_skipped_in_text(sample_all: Callable[..., list[Sample]]) -> None:
    whole, skipped = sample_all(), sample_all("--rollout-skip-special-tokens")
    assert _responses(whole) == _responses(skipped)
    assert any("<" in sample.response and "|>" in sample.response for sample in whole)
    assert not any("<|user|>" in sample.response for sample in skipped)


EVAL = (
    "--eval-interval",
    "1",
    "--n-samples-per-eval-prompt",
    "2",
    "--rollout-stop",
    "q",
    "--rollout-temperature",
    "0.7",
)
ROLLOUT = ("--rollout-max-response-len", "9", "--rollout-stop-token-ids", "11")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"temperature": 0.7, "top_p": 1.0, "top_k": -1, "max_new_tokens": 9}),
        (("--eval-temperature", "0"), {"temperature": 0.0}),
        (("--eval-top-p", "0.5", "--eval-top-k", "3"), {"top_p": 0.5, "top_k": 3, "temperature": 0.7}),
        (("--eval-top-k", "0"), {"top_k": -1}),
        (("--eval-max-response-len", "4"), {"max_new_tokens": 4}),
    ],
)
def test_evaluation_inherits_sampling_flags(
    parse: Callable[..., Args],
    run: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    words: tuple[str, ...],
    expected: dict[str, Any],
) -> None:
    hook = ("--custom-generate-function-path", "rollout_hooks_for_tests.generate_and_remember")
    args = parse(*EVAL, *ROLLOUT, *hook, "--eval-prompt-data", "first", "DATA@[:2]", "second", "DATA@[-1:]", *words)
    rollout_hooks_for_tests.REMEMBERED.clear()

    async def work(context: RolloutContext) -> dict[str, float]:
        return await Evaluator(args, tokenizer).run(0, context)

    metrics = run(args, work)
    assert (metrics["eval/first/num_prompts"], metrics["eval/second/num_prompts"]) == (2, 1)
    sent = [(json.loads(json.dumps(params.to_json())), sample) for params, sample in rollout_hooks_for_tests.REMEMBERED]
    assert len(sent) == 2 * (2 + 1)
    inherited = {"stop": ["q"], "stop_token_ids": [11], "no_stop_trim": True, "skip_special_tokens": False}
    for params, sample in sent:
        assert {name: params[name] for name in inherited} == inherited
        assert {name: params[name] for name in expected} == expected
        assert "q" not in sample.response[:-1]
        assert sample.response_length <= params["max_new_tokens"]
    assert len({params["sampling_seed"] for params, _ in sent}) == len(sent)
    if "--eval-temperature" in words:
        assert len({sample.response for _, sample in sent}) <= 3


def test_an_evaluation_set_has_keys_of_its_own(
    parse: Callable[..., Args],
    run: Callable[..., Any],
    data_file: Callable[..., str],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    other = data_file([{"text": "x", "answer": 5}, {"text": "y", "answer": 7}], "other.jsonl")
    keys = ("--eval-input-key", "text", "--eval-label-key", "answer")
    hook = ("--custom-generate-function-path", "rollout_hooks_for_tests.generate_and_remember")
    args = parse("--eval-interval", "1", "--eval-prompt-data", other, *keys, *hook)
    rollout_hooks_for_tests.REMEMBERED.clear()

    async def work(context: RolloutContext) -> dict[str, float]:
        return await Evaluator(args, tokenizer).run(0, context)

    assert run(args, work)["eval/other/num_prompts"] == 2
    seen = {(sample.prompt, sample.label) for _, sample in rollout_hooks_for_tests.REMEMBERED}
    assert seen == {("x", "5"), ("y", "7")}
