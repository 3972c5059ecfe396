"""The rollout manager without Ray: replay, hooks, and state."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from slime.cluster.rollout_manager import RolloutManager
from slime.config.args import Args
from slime.config.sampling_record import read_record
from slime.core.batch import TrainBatch
from slime.core.errors import RunError
from slime.core.sample import Sample
from slime.rollout.dump import write_dump
from slime.rollout.generate import sampling_record
from tests.cluster import timeline_hooks_for_tests as hooks
from tests.cluster.runs import Task
from tests.cluster.timeline_hooks_for_tests import GO_ON
from tests.saved_state import as_lists, through_a_file

HOOKS = "tests.cluster.hooks_for_tests"


def manager(task: Task, directory: Path, **flags: Any) -> RolloutManager:
    directory.mkdir(exist_ok=True)
    made = RolloutManager(Args(hf_checkpoint=str(task.model), save=str(directory), **flags), str(directory / "logs"))
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


def test_a_replay_keeps_the_dumps_own_record(task: Task, tmp_path: Path) -> None:
    """A dump of a replay records the sampling of the first run, whatever this run's flags are."""
    hot = sampling_record(Args(hf_checkpoint=str(task.model), rollout_temperature=0.7))
    write_dump(
        tmp_path / "0.jsonl",
        [[Sample(group_index=0, index=0, tokens=[1, 2], prompt_length=1, response_length=1, reward=1.0)]],
        hot,
    )
    paths = [str(tmp_path / name) for name in ("{rollout_id}.jsonl", "again.jsonl")]
    flags = {"load_debug_rollout_data": paths[0], "save_debug_rollout_data": paths[1]}
    replayed = manager(task, tmp_path, **flags, rollout_temperature=0.7)
    asyncio.run(replayed.generate(0))
    assert read_record(tmp_path / "again.jsonl") == hot
    asyncio.run(replayed.close())
    cold = manager(task, tmp_path, **flags)
    with pytest.raises(ValueError, match=r"at temperature 0\.7"):
        asyncio.run(cold.generate(0))
    asyncio.run(cold.close())


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


def test_a_custom_evaluation_function(task: Task, tmp_path: Path) -> None:
    hooked = manager(task, tmp_path, eval_function_path=f"{HOOKS}.evaluate")
    asyncio.run(hooked.set_policy_version(3))
    assert asyncio.run(hooked.evaluate(2)) == {"eval/own/reward": 2.3}
    asyncio.run(hooked.close())


def test_a_users_data_source_is_used_and_restored(task: Task, tmp_path: Path) -> None:
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


TIMELINE = "tests.cluster.timeline_hooks_for_tests"
AHEAD: dict[str, Any] = {
    "data_source_path": f"{HOOKS}.Numbers",
    "rollout_function_path": f"{TIMELINE}.draw_and_wait",
    "custom_convert_samples_to_train_data_path": f"{TIMELINE}.spoil",
    "label_key": "label",
    "rollout_batch_size": 3,
    "rollouts_ahead": 1,
}


def groups_of(generated: tuple[TrainBatch, dict[str, float]]) -> list[int]:
    return generated[0].columns["group_indices"].tolist()


def restored(task: Task, directory: Path, state: dict[str, Any]) -> RolloutManager:
    made = manager(task, directory, **AHEAD)
    made.load_state_dict(through_a_file(state))
    return made


def test_a_waiting_rollout_is_in_the_state(task: Task, tmp_path: Path) -> None:
    GO_ON.set()
    first = manager(task, tmp_path, **AHEAD)
    assert groups_of(asyncio.run(first.generate(0))) == [0, 1, 2]
    batch, metrics = asyncio.run(first.generate(1))
    state = first.state_dict(1)
    assert first.state_dict(2)["made"] is None, "the loop has trained on it"
    assert as_lists(state)["data_source"]["in_flight"] == []
    second = restored(task, tmp_path, state)
    again, same = asyncio.run(second.generate(1))
    assert {name: column.tolist() for name, column in again.columns.items()} == {
        name: column.tolist() for name, column in batch.columns.items()
    }
    assert [sample["reward"] for group in as_lists(state)["made"]["groups"] for sample in group] == [0.0] * 3, (
        "not yet spoilt"
    )
    assert same["rollout/reward"] == metrics["rollout/reward"] == 0.5
    assert "time/generation" not in same, "nothing was generated now"
    assert groups_of(asyncio.run(second.generate(2))) == [6, 7, 8]
    for made in (first, second):
        asyncio.run(made.close())


def test_a_rollout_in_flight_is_in_the_state(task: Task, tmp_path: Path) -> None:
    first = manager(task, tmp_path, **AHEAD)

    async def saved_meanwhile() -> tuple[dict[str, Any], dict[str, Any]]:
        GO_ON.set()
        await first.generate(0)
        GO_ON.clear()
        generating = asyncio.ensure_future(first.generate(1))
        await asyncio.sleep(0.05)
        state = first.state_dict(1)
        GO_ON.set()
        await generating
        return state, first.state_dict(1)

    meanwhile, after = asyncio.run(saved_meanwhile())
    assert [group[0]["group_index"] for group in as_lists(meanwhile)["data_source"]["in_flight"]] == [3, 4, 5]
    assert meanwhile["made"] is None
    assert as_lists(after)["data_source"]["in_flight"] == []
    assert after["made"]["rollout_id"] == 1
    for state in (meanwhile, after):
        second = restored(task, tmp_path, state)
        assert [groups_of(asyncio.run(second.generate(r))) for r in (1, 2)] == [[3, 4, 5], [6, 7, 8]]
        asyncio.run(second.close())
    asyncio.run(first.close())


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_aborted_rollout_is_made_again(
    task: Task, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its groups stay in flight. A rollout that was whole before the abort is not lost either."""
    monkeypatch.setattr(hooks, "GO_ON", go_on := asyncio.Event())  # an event that was waited for keeps its loop
    first = manager(task, tmp_path, **{**AHEAD, "rollouts_ahead": ahead})

    async def aborted() -> tuple[dict[str, Any], bool]:
        go_on.set()
        await first.generate(0)
        whole = not await first.abort(0)
        go_on.clear()
        return first.state_dict(1), whole

    async def cut_off(second: RolloutManager) -> dict[str, Any]:
        go_on.clear()
        generating = asyncio.ensure_future(second.generate(1))
        await asyncio.sleep(0.05)
        assert await second.abort(1), "it is not whole"
        with pytest.raises(RunError, match="aborted"):
            await generating
        return second.state_dict(1)

    state, whole = asyncio.run(aborted())
    assert (whole, as_lists(state)["data_source"]["in_flight"]) == (True, [])
    second = restored(task, tmp_path, state)
    again = restored(task, tmp_path, state := asyncio.run(cut_off(second)))
    assert [group[0]["group_index"] for group in as_lists(state)["data_source"]["in_flight"]] == [3, 4, 5]
    go_on.set()
    assert [groups_of(asyncio.run(again.generate(r))) for r in (1, 2)] == [[3, 4, 5], [6, 7, 8]]
    for made in (first, second, again):
        asyncio.run(made.close())


def test_prompts_left_out_are_reported_at_start(task: Task, tmp_path: Path) -> None:
    """The process's own log is not enough: a run that trains on half of the data has to report it to the user."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "label": "1"}) + "\n" for text in ("1+1=", "9" * 300)))
    made = RolloutManager(
        Args(hf_checkpoint=str(task.model), prompt_data=str(data), label_key="label", rollout_max_context_len=64),
        str(tmp_path / "logs"),
    )
    [warning] = made.start()
    assert f"{data}" in warning
    assert made.num_prompts() == 1
    asyncio.run(made.close())
