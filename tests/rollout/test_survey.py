"""The data section of a plan, compared with the prompts that a run loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.config.reward_types import REWARD_TYPES, needs_label
from slime.rollout.prompts import load_prompts
from slime.rollout.survey import SURVEYED, survey

Write = Callable[..., str]


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "hf")
    return str(tmp_path / "hf")


def _args(folder: str, path: Any, **flags: Any) -> Args:
    return Args(**{"hf_checkpoint": folder, "prompt_data": path, "label_key": "label", "rm_type": "math", **flags})


def test_lengths_are_those_of_the_loaded_prompts(
    folder: str, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = data_file([{"prompt": "x" * length, "label": f"so\n#### {length}"} for length in (9, 3, 40, 5)])
    args = _args(folder, path, apply_chat_template=True, system_prompt="s", rollout_max_context_len=40)
    keys = DataKeys.of(args, input_key="prompt", label_key="label")
    prompts = load_prompts(path, args, tokenizer, keys, longest=None).prompts
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    too_long = sum(length > 39 for length in lengths)
    assert 0 < too_long < 4
    lines = [text for _, text in survey(args)]
    assert lines[:3] == [
        "4 rows in 1 file",
        f"tokens in a prompt: median {lengths[1]}, p99 {lengths[3]}, max {lengths[3]}",
        f"{too_long} of 4 do not fit and are left out: they have more than 39 tokens",
    ]
    assert lines[3] == "first prompt: [gMASK]<sop><|system|>\\ns<|user|>\\nxxxxxxxxx<|assistant|>\\n<think>"
    assert lines[4] == "first label: 'so\\n#### 9': a response that states it gets 1 from math"


def test_router_policy_by_the_prompts_that_fit(folder: str, data_file: Write) -> None:
    path = data_file([{"prompt": "x" * length, "label": 1} for length in (500, 700, 5000)])
    flags: dict[str, Any] = {"rollout_engine": "sglang", "rollout_num_gpus": 8, "n_samples_per_prompt": 4}
    flags |= {"rollout_max_context_len": 1000, "rollout_num_gpus_per_engine": 1}
    flags |= {"eval_prompt_data": ("held-out", path), "eval_input_key": "prompt", "eval_label_key": "label"}
    lines = [text for _, text in survey(_args(folder, path, **flags))]
    saved = "450 tokens of prefill for each sample, whose response has up to 1,024"
    assert [line for line in lines if line.startswith("router")] == [
        f"router: round_robin: cache_aware would save only {saved}"
    ]
    assert not any(line.startswith("router") for line in (text for _, text in survey(_args(folder, path))))


def test_percentiles(folder: str, data_file: Write) -> None:
    path = data_file([{"prompt": "x" * length, "label": 1} for length in range(200, 0, -1)])
    assert survey(_args(folder, path))[1][1] == "tokens in a prompt: median 100, p99 198, max 200"


def test_large_files_and_missing_ones(folder: str, data_file: Write, tmp_path: Path) -> None:
    large = data_file([{"prompt": "a", "label": 1}] * (SURVEYED + 1) + [{"prompt": "a" * 9, "label": 1}])
    small = data_file([{"prompt": "aa", "label": 1}], "small.jsonl")
    [first, second, third, *_] = [text for _, text in survey(_args(folder, (large, small)))]
    assert first == "2,003 rows in 2 files"
    assert second == "tokens in a prompt: median 1, p99 1, max 2 (of the first 2,000 rows of each file)"
    assert third == "no limit of the context is known"
    assert survey(_args(folder, (large, str(tmp_path / "missing.jsonl")))) == []
    assert survey(_args(folder, "openai/gsm8k")) == []
    assert survey(_args(folder, large, num_rollout=0)) == []
    nowhere = survey(_args(str(tmp_path), small, eval_prompt_data=("held-out", small)))
    assert [name for name, _ in nowhere] == ["prompts", "", "", "eval held-out", ""]
    assert nowhere[1][1].startswith("prompts not tokenized: tokenizer.json cannot be read")


@pytest.mark.parametrize("rm_type", [name for name in REWARD_TYPES if needs_label(name)])
def test_a_right_label_passes_its_own_check(folder: str, data_file: Write, rm_type: str) -> None:
    row = {"prompt": "a", "label": "B", "metadata": {"choices": ["1", "2"]}} if rm_type == "gpqa" else None
    path = data_file([row or {"prompt": "a", "label": "1/2"}])
    assert f": a response that states it gets 1 from {rm_type}" in survey(_args(folder, path, rm_type=rm_type))[-1][1]


def test_labels_that_no_answer_matches(folder: str, data_file: Write) -> None:
    path = data_file([{"prompt": "a", "label": "}{"}])
    last = survey(_args(folder, path))[-1][1]
    assert last == "first label: '}{': math gives 0 even to a response that states it; check --label-key"
    last = survey(_args(folder, path, custom_rm_path="own.reward"))[-1][1]
    assert last == "first label: '}{' (not checked: no built-in reward compares with it)"
