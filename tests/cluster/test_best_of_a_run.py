"""A whole run that keeps its best checkpoint, and an evaluation of only that one afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slime.observability.best_checkpoint import FILE
from tests.cluster.runs import SMALL, Task, events, flags, train, without

pytestmark = pytest.mark.usefixtures("joined_ray")

EVALUATION = ("--eval-function-path", "tests.cluster.hooks_for_tests.evaluate_by_table", "--eval-interval", "1")


def test_the_best_checkpoint_is_kept_and_evaluated(task: Task, tmp_path: Path) -> None:
    """The evaluation's rewards are made up, with the best after two rollouts; it also reports the engines' checksum.

    An evaluation alone needs no prompts to train on.
    """
    save = tmp_path / "run"
    best = ("--keep-best-checkpoint", "eval/own/reward", "--keep-last-checkpoints", "1")
    few = ("--eval-prompt-data", f"{task.eval}@[0:2]")
    length = ("--num-rollout", "3", "--save-interval", "1")
    output = train(flags(task, save, *SMALL, *EVALUATION, *best, *few, length=length), tmp_path / "log.txt")
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    record = json.loads((save / FILE).read_text())
    assert (record["checkpoint"], record["value"]) == ("iter_0000001", 0.9)
    assert output.count("best checkpoint so far") == 2
    weights = events(save, "eval/own/weights")
    assert len(set(weights.values())) == 4, "they move from rollout to rollout"
    metrics = (save / "metrics.jsonl").read_text()

    shutil.copytree(save, tmp_path / "before")
    alone = ("--num-rollout", "0", "--ckpt-step", "1")
    train(without(flags(task, save, *SMALL, *EVALUATION, *few, length=alone), "--prompt-data"), tmp_path / "alone.txt")
    more = (save / "metrics.jsonl").read_text()
    assert more.startswith(metrics), "nothing of the run is taken back"
    [evaluation] = [json.loads(line) for line in more.removeprefix(metrics).splitlines()]
    assert evaluation["step"] == 2
    assert evaluation["eval/own/weights"] == weights[2], "the engines held what the checkpoint holds"
    for name in ("iter_0000001/slime_state.json", "iter_0000002/slime_state.json", FILE):
        assert (save / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
