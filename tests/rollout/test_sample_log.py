"""samples.jsonl has what was sampled: as it was judged, without secrets, and every answer of an evaluation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rollout_hooks_for_tests as hooks
from scripted_engine import ScriptedEngine
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.observability.samples_file import read_samples
from slime.rollout.context import RolloutContext
from slime.rollout.evaluate import Evaluator
from slime.rollout.metrics import replay_metrics
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.sample_log import SampleLog, spread


def groups(tokenizer: PreTrainedTokenizerFast) -> list[list[Sample]]:
    """Return two groups: one judged and post-processed, one with a failure and a truncated sample."""
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("<|user|>one", "two")]

    def sample(group: int, index: int, **fields: Any) -> Sample:
        tokens = [*prompts[group], 9, 9]
        common = {"prompt_length": len(prompts[group]), "response_length": 2, "response": "cc"}
        return Sample(group_index=group, index=index, tokens=tokens, **{**common, **fields})

    done, raw = Status.COMPLETED, {"raw_reward": {"score": 1.0, "style": 0.5, "read": "key-of-judge"}}
    reward = {"score": 3.0, "style": 0.5, "read": "key-of-judge"}
    return [
        [sample(0, index, reward=reward, metadata=raw, status=done, policy_versions=[4, 5]) for index in (0, 1)],
        [
            sample(1, 2, reward={"score": 0.0}, status=Status.TRUNCATED, label="key-of-judge"),
            sample(1, 3, reward_failure="timeout: key-of-judge", status=Status.FAILED, response="http://me:pw@host"),
        ],
    ]


def test_rows_tell_what_was_sampled(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    args = Args(reward_key="score", rm_url="http://judge?key=key-of-judge")
    log = SampleLog(tmp_path / "samples.jsonl", args, tokenizer)
    made = groups(tokenizer)
    asyncio.run(log.rollout(6, made))
    rows = list(read_samples(tmp_path / "samples.jsonl"))
    assert rows[0] == {
        "step": 7,
        "split": "train",
        "group": 0,
        "index": 0,
        "prompt": "<|user|>one",
        "response": "cc",
        "label": None,
        "reward": 1.0,
        "components": {"style": 0.5, "read": "***"},
        "failure": None,
        "status": "completed",
        "truncated": False,
        "prompt_tokens": 4,
        "response_tokens": 2,
        "policy_versions": [4, 5],
        "processed_reward": 3.0,
    }
    assert [row["prompt"] for row in rows] == ["<|user|>one"] * 2 + ["two"] * 2
    assert (rows[2]["label"], rows[2]["truncated"], rows[2]["policy_versions"]) == ("***", True, None)
    assert (rows[3]["reward"], rows[3]["failure"], rows[3]["response"]) == (None, "timeout: ***", "http://***@host")
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    assert sum(rewards) / len(rewards) == replay_metrics(args, made)["rollout/reward"], "both are before the hook"
    assert "key-of-judge" not in (tmp_path / "samples.jsonl").read_text()
    control = SampleLog(tmp_path / "open.jsonl", Args(reward_key="score"), tokenizer)
    asyncio.run(control.rollout(6, made))
    assert "key-of-judge" in (tmp_path / "open.jsonl").read_text(), "control: the mask is what hides it"


def test_a_rollouts_rows_are_bounded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    made = [[Sample(index=4 * group + at) for at in range(4)] for group in range(8)]

    def chosen(count: int) -> list[int]:
        return [sample.index for group in spread(made, count) for sample in group]

    assert chosen(0) == [] and spread([], 5) == []
    assert chosen(8) == [0, 1, 2, 3, 16, 17, 18, 19], "whole groups, from the whole rollout"
    assert chosen(6) == [0, 1, 2, 3, 16, 17]
    assert chosen(1000) == chosen(32) == list(range(32))
    for count in range(40):
        assert len(chosen(count)) == min(count, 32)
    log = SampleLog(tmp_path / "samples.jsonl", Args(log_samples_per_rollout=0), tokenizer)
    asyncio.run(log.rollout(0, made))
    assert not (tmp_path / "samples.jsonl").exists()


def test_an_evaluation_precedes_the_rollout_next_to_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    log, made = SampleLog(tmp_path / "samples.jsonl", Args(reward_key="score"), tokenizer), groups(tokenizer)

    async def write() -> None:
        with log.evaluating():
            await log.rollout(6, made)
            await log.evaluation(6, "a", made[:1])
        await log.rollout(7, made)

    asyncio.run(write())
    written = [(row["step"], row["split"]) for row in read_samples(tmp_path / "samples.jsonl")]
    assert written == [(6, "eval/a")] * 2 + [(7, "train")] * 4 + [(8, "train")] * 4


def test_every_evaluated_answer_is_written(
    data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "q", "label": label} for label in ("1", "2", "abort")]
    args = Args(
        eval_prompt_data=("data", data_file(rows)),
        eval_input_key="prompt",
        eval_label_key="label",
        eval_temperature=1.0,
        eval_top_p=1.0,
        eval_top_k=-1,
        n_samples_per_eval_prompt=3,
        eval_max_response_len=4,
        eval_rm_type="random",
        custom_generate_function_path="rollout_hooks_for_tests.number",
        log_samples_per_rollout=1,
    )
    hooks.CALLS.clear()
    client: Any = ScriptedEngine()
    log = SampleLog(tmp_path / "samples.jsonl", args, tokenizer)
    context = RolloutContext(args, client, tokenizer, RewardPool(args))
    metrics = asyncio.run(Evaluator(args, tokenizer, log).run(4, context))
    found = list(read_samples(tmp_path / "samples.jsonl"))
    assert [(row["step"], row["split"], row["group"], row["index"]) for row in found] == [
        (4, "eval/data", number // 3, number) for number in range(9)
    ]
    assert [row["label"] for row in found] == ["1"] * 3 + ["2"] * 3 + ["abort"] * 3
    judged = [row["reward"] for row in found if row["failure"] is None]
    assert sum(judged) / len(judged) == pytest.approx(metrics["eval/data/reward_judged"])
    assert {row["failure"] for row in found[6:]} == {"aborted by the engine, 100 times"}
