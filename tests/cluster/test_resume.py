"""Whole runs: engine and trainer agree after every weight update, and a resumed run continues the unbroken one."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.cluster.dump import read_dump
from slime.models.hf_files import HFReader
from slime.observability.phases import PHASES
from tests.cluster.runs import Task, copy_checkpoint, events, flags, train

GAP = "train/logprob_gap_max"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rollouts in one go, each dumped, with checkpoints behind the second and the fourth."""
    save = tmp_path_factory.mktemp("unbroken") / "run"
    extra = ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl"), "--save-hf", str(save / "hf")]
    extra += ["--eval-prompt-data", f"{task.eval}@[0:8]", "--eval-interval", "2"]
    (save.parent / "output.txt").write_text(train(flags(task, save, *extra), save.parent / "log.txt"))
    return save


def weights(directory: Path) -> dict[str, bytes]:
    reader = HFReader(directory)
    return {name: reader.get(name).numpy().tobytes() for name in reader.names()}


def test_engines_and_trainers_agree_after_every_update(unbroken: Path) -> None:
    gaps = events(unbroken, GAP)
    assert sorted(gaps) == [1, 2, 3, 4]
    assert max(gaps.values()) <= TOLERANCE, gaps
    assert all(norm > 0 for norm in events(unbroken, "train/grad_norm").values()), "the weights have to move"


def test_the_agreement_check_notices_another_policy(task: Task, unbroken: Path, tmp_path: Path) -> None:
    """Rollout 3's samples, trained on by the policy of rollout 0."""
    save = tmp_path / "run"
    dump = unbroken / "dump/3.jsonl"
    extra = ["--load-debug-rollout-data", str(dump), "--debug-train-only", "--num-rollout", "1"]
    train(flags(task, save, *extra), tmp_path / "log.txt")
    assert events(save, GAP)[1] > TOLERANCE


def test_a_steps_phases_sum_to_its_wall_time_and_are_printed(unbroken: Path) -> None:
    for step in range(1, 5):
        parts = {name: events(unbroken, f"time/{name}")[step] for name in (*PHASES, "idle")}
        assert sum(parts.values()) == pytest.approx(events(unbroken, "time/step")[step], abs=1e-6)
        assert all(seconds >= 0 for seconds in parts.values()), parts
        assert parts["generation"] > 0
        assert parts["training"] > 0
        assert parts["weight_sync"] > 0
    output = (unbroken.parent / "output.txt").read_text()
    assert "generation" in output
    assert "idle" in output


def test_a_resumed_run_draws_the_same_prompts(task: Task, unbroken: Path, tmp_path: Path) -> None:
    """The reference of the resumed run is another model: its engines have to hold the actor all the same."""
    save = tmp_path / "run"
    copy_checkpoint(unbroken, save, 1)
    extra = ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl")]
    extra += ["--ref-load", str(task.other_model), "--use-kl-loss", "--kl-loss-coef", "0.001"]
    extra += ["--eval-prompt-data", f"{task.eval}@[0:8]", "--eval-interval", "2"]
    train(flags(task, save, *extra), tmp_path / "log.txt")
    for rollout_id in (2, 3):
        first, second = (read_dump(path / f"dump/{rollout_id}.jsonl") for path in (unbroken, save))
        assert [[(s.group_index, s.index, s.prompt) for s in group] for group in first] == [
            [(s.group_index, s.index, s.prompt) for s in group] for group in second
        ]
    assert not (save / "dump/1.jsonl").exists()
    gaps = events(save, GAP)
    assert gaps[3] <= TOLERANCE, "the engines of the resumed run hold the actor"
    assert events(save, "train/kl_loss")[3] > 0.01, "the reference is another model, so holding it would have shown"
    assert sorted(events(save, "rollout/reward")) == [1, 2, 3, 4], "the metrics file continues"
    assert sorted(events(save, "eval/eval/reward")) == [0, 2, 4]


def test_replaying_the_samples_gives_the_same_weights(task: Task, unbroken: Path, tmp_path: Path) -> None:
    """Bit for bit: optimizer, schedule and data order are in the checkpoint (tests/megatron has the control)."""
    save = tmp_path / "run"
    copy_checkpoint(unbroken, save, 1)
    extra = ["--load-debug-rollout-data", str(unbroken / "dump/{rollout_id}.jsonl"), "--debug-train-only"]
    train(flags(task, save, *extra, "--save-hf", str(save / "hf")), tmp_path / "log.txt")
    assert weights(save / "hf") == weights(unbroken / "hf")
