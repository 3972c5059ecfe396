"""Whole runs in special cases: nothing left to do, a resume that is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slime.observability.metrics_log import read_metrics
from tests.cluster.runs import SMALL, Task, events, flags, start, train

pytestmark = pytest.mark.usefixtures("joined_ray")


def test_finished_runs_and_refused_resumes_change_nothing(task: Task, tmp_path: Path) -> None:
    """The user sees the error's own sentence, and no traceback."""
    save = tmp_path / "run"
    data = tmp_path / "train.jsonl"
    shutil.copy(task.train, data)
    extra = ["--num-rollout", "1", "--prompt-data", str(data), "--eval-prompt-data", f"{task.eval}@[0:4]"]
    arguments = flags(task, save, *SMALL, *extra)
    train(arguments, tmp_path / "log.txt")
    metrics = (save / "metrics.jsonl").read_bytes()
    assert [event["step"] for event in read_metrics(save / "metrics.jsonl")] == [0, 1, 1, 1]
    assert len(events(save, "sync/gb_per_s")) == 1

    data.write_text(data.read_text().replace("+", "-"))
    process = start([*arguments, "--num-rollout", "2"], tmp_path / "refused.txt")
    assert process.wait(timeout=120) == 1
    output = (tmp_path / "refused.txt").read_text()
    assert f"{data}" in output
    assert "Traceback" not in output
    assert (save / "metrics.jsonl").read_bytes() == metrics

    shutil.copy(task.train, data)
    output = train(arguments, tmp_path / "again.txt")
    assert "nothing left to train: 1 of 1 rollouts are done" in output
    assert sorted(events(save, "eval/eval/reward")) == [0, 1]
    assert len(read_metrics(save / "metrics.jsonl")) == 4
