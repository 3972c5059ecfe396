from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.batch import from_samples
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.sft_rollout import generate_rollout
from tests.saved_state import as_json

EOS = "<|user|>"


def _rollout(path: str, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> tuple[RolloutResult, DataBuffer]:
    defaults: dict[str, Any] = {
        "prompt_data": path,
        "label_key": "response",
        "apply_chat_template": True,
        "rollout_batch_size": 2,
        "loss_type": "sft_loss",
    }
    args = Args(**{**defaults, **kwargs})
    buffer = DataBuffer(args, tokenizer)
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    return asyncio.run(generate_rollout(args, 0, buffer, context)), buffer


def _row(number: int, response: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{number}?"}], "response": response}


def test_prompt_then_response_then_end(data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    path = data_file([_row(0, r"1</think>\boxed{2}"), _row(1, "closed" + EOS)])
    result, _ = _rollout(path, tokenizer)
    samples = [sample for group in result.groups for sample in group]
    assert [tokenizer.decode(sample.tokens) for sample in samples] == [
        r"[gMASK]<sop><|user|>" + "\n0?<|assistant|>\n<think>" + r"1</think>\boxed{2}" + EOS,
        "[gMASK]<sop><|user|>\n1?<|assistant|>\n<think>closed" + EOS,
    ]
    batch = from_samples(samples)
    assert batch.columns["loss_mask"].sum() == sum(sample.response_length for sample in samples)
    assert samples[1].response_length == len("closed") + 1
    assert not batch.has("rollout_log_probs")
    assert batch.columns["rewards"].tolist() == [0, 0]
    assert result.metrics["rollout/tokens"] == sum(sample.response_length for sample in samples)


def test_an_example_that_is_too_long_is_counted(
    data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = data_file([_row(0, "short"), _row(1, "x" * 50), _row(2, "short")])
    result, buffer = _rollout(path, tokenizer, rollout_max_context_len=30)
    assert [group[0].group_index for group in result.groups] == [0, 2]
    assert result.metrics["rollout/groups_dropped/too_long"] == 1
    assert as_json(buffer.state_dict())["buffer"] == []
    with pytest.raises(ValueError, match="longer than the context of 12 tokens"):
        _rollout(path, tokenizer, rollout_max_context_len=12)


def test_a_missing_response_key_is_an_error(data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="--label-key"):
        _rollout(data_file([_row(0, "a")]), tokenizer, label_key=None)
