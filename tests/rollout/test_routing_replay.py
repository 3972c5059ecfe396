"""--use-routing-replay: samples get the routes that engines report, whole, and for exactly their tokens."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.architecture import Architecture
from slime.core.batch import from_samples
from slime.core.sample import Sample, Status
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample
from slime.rollout.reward_pool.pool import RewardPool

LAYERS, DENSE, TOPK = 3, 1, 2
SHAPE = Architecture(
    family="glm4_moe",
    num_layers=LAYERS,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    num_experts=1000,
    moe_ffn_hidden_size=8,
    moe_router_topk=TOPK,
    first_dense_layers=DENSE,
)
ARGS = Args(use_routing_replay=True, architecture=SHAPE, rollout_max_response_len=16)


def routes(tokens: list[int], version: int) -> np.ndarray:
    """Return routes of all tokens but the last, as an engine with weights `version`: all different, zeros if dense."""
    numbers = np.arange((len(tokens) - 1) * LAYERS * TOPK).reshape(-1, LAYERS, TOPK) * 10 + version
    numbers[:, :DENSE] = 0
    return numbers.astype(np.int32)


class AnsweringEngine:
    """Answers from a list, in turn, and keeps the requests."""

    def __init__(self, *answers: tuple[list[int], str, int], **changes: Any) -> None:
        """`answers`: (tokens, finish reason, weight version) of each."""
        self.answers, self.changes = list(answers), changes
        self.asked: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        self.asked.append(request)
        tokens, reason, version = self.answers.pop(0)
        prompt = request.input_ids or []
        flat = routes(prompt + tokens, version).reshape(-1)
        response = GenerateResponse.from_json(
            {
                "output_ids": tokens,
                "text": "",
                "meta_info": {
                    "output_token_logprobs": [(-1.0, token, None) for token in tokens],
                    "finish_reason": {"type": reason},
                    "weight_version": str(version),
                    "prompt_tokens": len(prompt),
                    "completion_tokens": len(tokens),
                },
            }
        )
        experts = flat if request.return_routed_experts else None
        return replace(response, **{"routed_experts": experts, **self.changes})


def generate(
    engine: AnsweringEngine, tokenizer: PreTrainedTokenizerFast, *, args: Args = ARGS, **params: Any
) -> Sample:
    context = RolloutContext(args, engine, tokenizer, RewardPool(args))  # pyright: ignore[reportArgumentType]
    sample = Sample(group_index=0, index=0, tokens=[20, 21, 22], prompt_length=3, reward=1.0)

    async def parts() -> Sample:
        done = sample
        while engine.answers:
            done = await generate_sample(args, done, SamplingParams(max_new_tokens=16, **params), context)
        return done

    return asyncio.run(parts())


def test_a_sample_has_the_layers_with_experts(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = generate(AnsweringEngine(([30, 31, 3], "stop", 4)), tokenizer)
    assert sample.routed_experts is not None and sample.routed_experts.dtype == np.int16
    np.testing.assert_array_equal(sample.routed_experts, routes(sample.tokens, 4)[:, DENSE:])
    column = from_samples([sample, sample.copy()]).rows("routed_experts")
    for row in column:
        np.testing.assert_array_equal(row[:-1], routes(sample.tokens, 4)[:, DENSE:])
        assert (row[-1] == -1).all(), "nobody has run the last token"


def test_the_newest_part_has_routes_of_all_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = AnsweringEngine(([30, 31], "abort", 4), ([], "abort", 5), ([33, 3], "stop", 6))
    sample = generate(engine, tokenizer)
    assert [len(request.input_ids or []) for request in engine.asked] == [3, 5, 5]
    assert sample.policy_versions == [4, 4, 6, 6]
    np.testing.assert_array_equal(sample.routed_experts, routes(sample.tokens, 6)[:, DENSE:])


def test_an_early_abort_keeps_the_old_routes(tokenizer: PreTrainedTokenizerFast) -> None:
    first = generate(AnsweringEngine(([30, 31], "abort", 4)), tokenizer)
    engine = AnsweringEngine(([], "abort", 5), routed_experts=None)
    context = RolloutContext(ARGS, engine, tokenizer, RewardPool(ARGS))  # pyright: ignore[reportArgumentType]
    sample = asyncio.run(generate_sample(ARGS, first, SamplingParams(max_new_tokens=16), context))
    assert sample.status is Status.ABORTED
    np.testing.assert_array_equal(sample.routed_experts, routes(sample.tokens, 4)[:, DENSE:])


def test_text_cut_at_a_stop_has_no_routes(tokenizer: PreTrainedTokenizerFast) -> None:
    stop = tokenizer.decode([31, 32])
    engine = AnsweringEngine(([30, 31], "abort", 4), ([32, 33, 34], "length", 4))
    sample = generate(engine, tokenizer, stop=stop)
    assert sample.tokens[3:] == [30, 31, 32] and sample.status is Status.COMPLETED
    np.testing.assert_array_equal(sample.routed_experts, routes(sample.tokens, 4)[:, DENSE:])


def test_an_engine_without_routes_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="start it with --enable-return-routed-experts"):
        generate(AnsweringEngine(([30, 3], "stop", 4), routed_experts=None), tokenizer)
    with pytest.raises(ValueError, match=r"returned 23 experts for 4 tokens, and in each of 3 layers a token has 2"):
        generate(AnsweringEngine(([30, 3], "stop", 4), routed_experts=np.zeros(23, np.int32)), tokenizer)


def test_nothing_is_asked_without_the_flag(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = AnsweringEngine(([30, 3], "stop", 4))
    assert generate(engine, tokenizer, args=replace(ARGS, use_routing_replay=False)).routed_experts is None
    assert "return_routed_experts" not in engine.asked[0].to_json()
    asked = replace(engine.asked[0], return_routed_experts=True).to_json()
    assert (asked["return_routed_experts"], asked["routed_experts_start_len"]) == (True, 0)


def test_samples_go_through_json(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = generate(AnsweringEngine(([30, 31, 3], "stop", 4)), tokenizer)
    back = Sample.from_dict(json.loads(json.dumps(sample.to_dict())))
    assert back == sample
    np.testing.assert_array_equal(back.routed_experts, sample.routed_experts)
    assert back.to_bare_prompt().routed_experts is None
    back.tokens = back.tokens[:5]
    back.response_length, back.rollout_log_probs, back.policy_versions = 2, None, None
    with pytest.raises(ValueError, match=r"routed_experts has shape \[5, 2, 2\] for 5 tokens"):
        back.check()
