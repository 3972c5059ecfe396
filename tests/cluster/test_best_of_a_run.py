"""A whole run that keeps its best checkpoint; what is started on its directory afterwards changes none of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slime.observability.best_checkpoint import FILE
from slime.observability.metrics_log import read_metrics
from tests.cluster.runs import RUN_TIMEOUT_S, SMALL, Task, events, flags, start, train, without
from tests.kill.compare import is_measured

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

EVALUATION = ("--eval-function-path", "tests.cluster.hooks_for_tests.evaluate_by_table", "--eval-interval", "1")
KEEPS_BEST = ("--keep-best-checkpoint", "eval/own/reward", "--keep-last-checkpoints", "1")
LENGTH = ("--num-rollout", "3", "--save-interval", "1")


def arguments(task: Task, directory: Path, *extra: str, length: tuple[str, ...] = LENGTH) -> list[str]:
    data = ("--prompt-data", str(directory / "train.jsonl"), "--eval-prompt-data", f"{task.eval}@[0:2]")
    return flags(task, directory / "run", *SMALL, *EVALUATION, *data, *extra, length=length)


@pytest.fixture(scope="module")
def finished(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rollouts; the evaluation's rewards are made up, with the best after two, and it adds engines' checksums."""
    directory = tmp_path_factory.mktemp("finished")
    shutil.copy(task.train, directory / "train.jsonl")
    output = train(arguments(task, directory, *KEEPS_BEST), directory / "log.txt")
    (directory / "output.txt").write_text(output)
    shutil.copytree(directory / "run", directory / "before")
    return directory


def without_measured(path: Path) -> dict[tuple[float, str], float]:
    """Return every metric by step and name, without those that depend on the clock or on memory."""
    return {
        (event["step"], name): value
        for event in read_metrics(path)
        for name, value in event.items()
        if name != "step" and not is_measured(name)
    }


def assert_unchanged(directory: Path) -> None:
    """Check that the run's checkpoints and its record of the best one are as they were."""
    for name in ("iter_0000001/slime_state.json", "iter_0000002/slime_state.json", FILE):
        assert (directory / "run" / name).read_bytes() == (directory / "before" / name).read_bytes()


def test_the_best_checkpoint_is_kept(finished: Path) -> None:
    save = finished / "run"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    record = json.loads((save / FILE).read_text())
    assert (record["checkpoint"], record["value"]) == ("iter_0000001", 0.9)
    assert (finished / "output.txt").read_text().count("best checkpoint so far") == 2
    weights = events(save, "eval/own/weights")
    assert len(set(weights.values())) == 4, "they move from rollout to rollout"
    assert len(events(save, "sync/gb_per_s")) == 3
    assert [event["step"] for event in read_metrics(save / "metrics.jsonl") if "train/loss" in event] == [1, 2, 3]


def test_a_resume_with_other_data_is_refused(task: Task, finished: Path) -> None:
    """The error comes before anything starts, from what the checkpoint holds of its data."""
    data = finished / "train.jsonl"
    text = data.read_text()
    data.write_text(text.replace("+", "-"))
    try:
        longer = arguments(task, finished, *KEEPS_BEST, length=("--num-rollout", "4", "--save-interval", "1"))
        assert start(longer, finished / "refused.txt").wait(timeout=RUN_TIMEOUT_S) == 1
    finally:
        data.write_text(text)
    output = (finished / "refused.txt").read_text()
    assert output.startswith("1 problem with the arguments:\n  --prompt-data") and "Traceback" not in output
    assert f"the data are not those with which {finished / 'run/iter_0000002'} was written" in output
    assert (finished / "run/metrics.jsonl").read_text() == (finished / "before/metrics.jsonl").read_text()
    assert_unchanged(finished)


def test_a_finished_run_has_nothing_left_to_train(task: Task, finished: Path) -> None:
    output = train(arguments(task, finished, *KEEPS_BEST), finished / "again.txt")
    assert "nothing left to train: 3 of 3 rollouts are done" in output
    before, now = (without_measured(finished / name / "metrics.jsonl") for name in ("before", "run"))
    assert now == before, "the last evaluation is repeated, and finds the same"
    assert_unchanged(finished)


def test_the_best_checkpoint_is_evaluated_alone(task: Task, finished: Path) -> None:
    """This needs no prompts to train on."""
    alone = arguments(task, finished, length=("--num-rollout", "0", "--ckpt-step", "1"))
    before = (finished / "run/metrics.jsonl").read_text()
    train(without(without(alone, "--prompt-data"), "--prompt-data"), finished / "alone.txt")
    now = (finished / "run/metrics.jsonl").read_text()
    assert now.startswith(before), "nothing of the run is taken back"
    [evaluation] = [json.loads(line) for line in now.removeprefix(before).splitlines()]
    assert evaluation["step"] == 2
    assert_unchanged(finished)
    in_the_run = without_measured(finished / "before/metrics.jsonl")
    for name, value in evaluation.items():
        if name != "step" and not is_measured(name):
            assert in_the_run[2, name] == value, f"{name} with a rollout generated at the same time"
    assert {"eval/own/weights", "eval/eval/response_length"} <= evaluation.keys()
