"""The rollout manager without Ray: replay, its hooks, and its state."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from slime.cluster.dump import write_dump
from slime.cluster.rollout_manager import RolloutManager
from slime.config.args import Args
from slime.core.sample import Sample
from tests.cluster.runs import Task

HOOKS = "tests.cluster.hooks_for_tests"


def manager(task: Task, directory: Path, **flags: Any) -> RolloutManager:
    directory.mkdir(exist_ok=True)
    made = RolloutManager(Args(hf_checkpoint=str(task.model), save=str(directory), **flags), str(directory))
    made.start()
    return made


@pytest.fixture
def dump(tmp_path: Path) -> str:
    groups = [
        [Sample(group_index=g, index=2 * g + i, tokens=[1, 2], prompt_length=1, response_length=1, reward=float(i))]
        for g in range(2)
        for i in range(2)
    ]
    write_dump(tmp_path / "0.jsonl", groups)
    return str(tmp_path / "{rollout_id}.jsonl")


def test_a_replay_needs_no_prompts(task: Task, tmp_path: Path, dump: str) -> None:
    replayed = manager(task, tmp_path, load_debug_rollout_data=dump)
    batch, metrics = asyncio.run(replayed.generate(0))
    assert len(batch) == 4
    assert metrics["rollout/reward"] == 0.5
    assert replayed.state_dict() == {"data_source": None, "made": None, "policy_version": 0}
    asyncio.run(replayed.close())


def test_the_log_and_conversion_hooks_are_called(task: Task, tmp_path: Path, dump: str) -> None:
    hooked = manager(
        task,
        tmp_path,
        load_debug_rollout_data=dump,
        custom_rollout_log_function_path=f"{HOOKS}.log_rollout",
        custom_convert_samples_to_train_data_path=f"{HOOKS}.first_two",
    )
    batch, _ = asyncio.run(hooked.generate(0))
    assert len(batch) == 2
    assert (tmp_path / "logged").read_text() == "0 4 0.5"
    asyncio.run(hooked.close())


def test_an_evaluation_of_ones_own(task: Task, tmp_path: Path) -> None:
    hooked = manager(task, tmp_path, eval_function_path=f"{HOOKS}.evaluate")
    asyncio.run(hooked.set_policy_version(3))
    assert asyncio.run(hooked.evaluate(2)) == {"eval/own/reward": 2.3}
    asyncio.run(hooked.close())


def test_a_data_source_of_ones_own_is_asked_and_restored(task: Task, tmp_path: Path) -> None:
    flags = {
        "data_source_path": f"{HOOKS}.Numbers",
        "rollout_function_path": "slime.rollout.sft_rollout.generate_rollout",
        "label_key": "label",
        "rollout_batch_size": 3,
    }
    first = manager(task, tmp_path, **flags)
    assert first.num_prompts() == 6
    batch, _ = asyncio.run(first.generate(0))
    assert batch.columns["group_indices"].tolist() == [0, 1, 2]
    second = manager(task, tmp_path, **flags)
    second.load_state_dict(first.state_dict())
    batch, _ = asyncio.run(second.generate(1))
    assert batch.columns["group_indices"].tolist() == [3, 4, 5]
    for made in (first, second):
        asyncio.run(made.close())


def test_prompts_that_are_left_out_are_said_at_the_start(task: Task, tmp_path: Path) -> None:
    """The process's own log alone would not do: a run that trains on half of the data has to say so."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "label": "1"}) + "\n" for text in ("1+1=", "9" * 300)))
    made = RolloutManager(
        Args(hf_checkpoint=str(task.model), prompt_data=str(data), label_key="label", rollout_max_context_len=64),
        str(tmp_path),
    )
    [warning] = made.start()
    assert f"{data}" in warning
    assert made.num_prompts() == 1
    asyncio.run(made.close())
