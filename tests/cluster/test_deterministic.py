"""Whole runs with --deterministic: another number of engines, and another timing, change no bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.config.sampling_record import read_record
from slime.rollout.dump import read_dump
from tests.cluster.runs import Task, flags, train
from tests.kill.compare import differences

pytestmark = pytest.mark.usefixtures("joined_ray")

FILTER = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
ONE_TRAINER = ["--actor-num-gpus-per-node", "1"]
COLLECTING = ["--over-sampling-batch-size", "6", "--dynamic-sampling-filter-path", FILTER]
CUT_OFF = ["--partial-rollout", "--partial-rollout-max-tokens", "14"]
TRAINING = ["--num-steps-per-rollout", "2", "--use-tis", "--num-rollout", "2"]


def run(task: Task, save: Path, *extra: str) -> Path:
    dump = ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl")]
    words = flags(task, save, *ONE_TRAINER, *COLLECTING, *CUT_OFF, *TRAINING, *dump, *extra, length=())
    train(words, save.parent / f"{save.name}.txt")
    return save


def log_probs(save: Path) -> list[list[float] | None]:
    """Return the log-probs of the first rollout's samples."""
    return [sample.rollout_log_probs for group in read_dump(save / "dump/0.jsonl") for sample in group]


def test_two_runs_are_one(task: Task, tmp_path: Path) -> None:
    """Groups are over-sampled, filtered and cut off, in two optimizer steps a rollout; all results are compared."""
    two = run(task, tmp_path / "two", "--deterministic")
    one = run(task, tmp_path / "one", "--deterministic", "--rollout-num-gpus", "1")
    assert differences(two, one) == []
    record = read_record(two / "dump/0.jsonl")
    assert record is not None and record.sampling is not None and record.tokenizer is not None
    # Control: the engine's fast path rounds differently in the last bits of log-probs, and the test notices that.
    other = run(task, tmp_path / "other", "--debug-rollout-only", "--num-rollout", "1")
    assert log_probs(one) == log_probs(two) != log_probs(other)
