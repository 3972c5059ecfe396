"""--rollout-function-path through the rollout manager, which calls it and makes its result the training batch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slime.cluster.rollout_manager import RolloutManager
from slime.config.args import Args
from tests.cluster.runs import Task

HOOKS = "tests.cluster.hooks_for_tests"


@pytest.mark.parametrize("function", ["roll", "roll_plainly"])
def test_a_custom_rollout_function(task: Task, tmp_path: Path, function: str) -> None:
    args = Args(
        hf_checkpoint=str(task.model),
        save=str(tmp_path),
        data_source_path=f"{HOOKS}.Numbers",
        rollout_function_path=f"{HOOKS}.{function}",
    )
    manager = RolloutManager(args, str(tmp_path / "logs"))
    manager.start()
    batch, metrics = asyncio.run(manager.generate(7))
    assert batch.columns["group_indices"].tolist() == [0, 1, 2]
    assert batch.columns["rewards"].tolist() == [7.0, 7.0, 7.0], "the rollout's id came through"
    assert metrics["rollout/own"] == 3
    asyncio.run(manager.close())
