"""The record of the best checkpoint: what counts, what stays, and what it protects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime.core.errors import RunError
from slime.observability.best_checkpoint import FILE, Best, BestCheckpoint, read_best

METRIC = "eval/few/reward"


class Run:
    """A run that saves and evaluates when the test calls it."""

    def __init__(self, directory: Path, metric: str = METRIC) -> None:
        self.lines: list[str] = []
        self.directory = directory
        self.record = BestCheckpoint(directory, metric, say=self.lines.append)

    def save(self, rollout_id: int) -> None:
        path = self.directory / f"iter_{rollout_id:07d}"
        path.mkdir(exist_ok=True)
        self.record.saved(path, step=rollout_id + 1)

    def evaluate(self, step: int, value: float, metric: str = METRIC) -> None:
        self.record.evaluated({metric: value, "memory/evaluation_peak_gb": 1.0}, step=step)

    @property
    def best(self) -> tuple[int, float] | None:
        best = read_best(self.directory)
        return None if best is None else (best.rollout_id, best.value)


def test_only_what_was_saved_and_evaluated_counts(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.evaluate(0, 0.9)  # before the first rollout: nothing is saved
    run.save(0)
    run.evaluate(2, 0.9)  # an evaluation of weights that no checkpoint has
    assert run.best is None
    run.save(3)
    run.evaluate(4, 0.5)
    assert run.best == (3, 0.5)
    run.evaluate(6, 0.8)
    assert run.best == (3, 0.5)
    assert json.loads((tmp_path / FILE).read_text()) == {
        "metric": METRIC,
        "value": 0.5,
        "rollout_id": 3,
        "checkpoint": "iter_0000003",
    }
    assert run.lines == [f"best checkpoint so far: {tmp_path / 'iter_0000003'} ({METRIC} 0.5)"]


def test_the_largest_and_earliest_value_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for rollout_id, value in enumerate([-1.0, 0.5, 0.5, 0.4, float("nan"), float("inf")]):
        run.save(rollout_id)
        run.evaluate(rollout_id + 1, value)
    assert run.best == (1, 0.5)


@pytest.mark.parametrize("metric", ["eval/few/loss", "eval/few/loss_per_sample"])
def test_of_losses_the_smallest_stays(tmp_path: Path, metric: str) -> None:
    run = Run(tmp_path, metric)
    for rollout_id, value in enumerate([2.0, 0.5, 0.5, 0.6, float("nan")]):
        run.save(rollout_id)
        run.evaluate(rollout_id + 1, value, metric)
    assert run.best == (1, 0.5)


def test_a_resumed_run_continues_the_record(tmp_path: Path) -> None:
    first = Run(tmp_path)
    first.save(0)
    first.evaluate(1, 0.5)
    resumed = Run(tmp_path)
    resumed.save(1)
    resumed.evaluate(2, 0.4)
    assert resumed.best == (0, 0.5)
    resumed.save(2)
    resumed.evaluate(3, 0.6)
    assert resumed.best == (2, 0.6)


def test_a_removed_checkpoint_or_another_metric_resets(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(0)
    run.evaluate(1, 0.5)
    (tmp_path / "iter_0000000").rmdir()
    assert read_best(tmp_path) is None
    again = Run(tmp_path)
    again.save(1)
    again.evaluate(2, 0.1)
    assert again.best == (1, 0.1)
    other = BestCheckpoint(tmp_path, "eval/few/pass@4", say=run.lines.append)
    assert "search starts again, by eval/few/pass@4" in run.lines[-1]
    other.saved(tmp_path / "iter_0000001", step=2)
    other.evaluated({"eval/few/pass@4": 0.05}, step=2)
    assert read_best(tmp_path) == Best("eval/few/pass@4", 0.05, 1, "iter_0000001")


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    message = (
        r"--keep-best-checkpoint eval/few/pass@4: .*after 1 rollouts has no such metric .*name one of eval/few/reward"
    )
    with pytest.raises(RunError, match=message):
        Run(tmp_path, "eval/few/pass@4").evaluate(1, 0.5)
    for text in ("{", "[]", '{"metric": "eval/few/reward"}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(RunError, match=f"{FILE} is damaged .*remove it"):
            Run(tmp_path)


def test_a_failed_evaluation_keeps_run_and_record(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(0)
    run.evaluate(1, 0.5)
    run.save(1)
    run.record.evaluated({"eval/few/failed": 1.0, "eval/few/num_prompts": 2.0}, step=2)
    assert run.best == (0, 0.5)
    assert run.lines[-1].startswith(f"WARNING the evaluation after 2 rollouts has no {METRIC}")
    with pytest.raises(RunError, match="no such metric"):
        run.record.evaluated({"eval/few/failed": 0.0, "eval/few/reward_judged": 0.5}, step=2)
