"""Whole runs: engine and trainer agree after every weight update, and a resumed run continues the unbroken one.

A run with --colocate trains like the unbroken one, which has separate devices.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime.megatron.checkpoint.files import find_checkpoint
from slime.models.hf_files import HFReader
from slime.observability.console.text import PLAIN_WIDTH, number
from slime.observability.phases import MEASURED, PHASES
from slime.observability.run_record import RUN_RECORD
from slime.observability.samples_file import read_samples
from slime.observability.step_files import StepFiles
from slime.rollout.dump import read_dump
from tests.cluster.runs import SMALL, Task, copy_checkpoint, events, flags, log_probs, train, without
from tests.observability.test_trackers import of_metrics, scalars, wandb_rows

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

GAP = "train/logprob_gap_max"
TOLERANCE = 1e-4


def two_epochs(task: Task, save: Path, *extra: str) -> list[str]:
    """Use seven prompts, twice, in rollouts of four: the last of four rollouts begins a third epoch."""
    length = ["--num-epoch", "2", "--prompt-data", f"{task.train}@[0:7]", "--lr-decay-style", "cosine"]
    return flags(task, save, *length, "--balance-data", *extra, length=())


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rollouts without a break, each dumped, with checkpoints after the second and the fourth."""
    save = tmp_path_factory.mktemp("unbroken") / "run"
    extra = ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl"), "--save-hf", str(save / "hf")]
    extra += ["--eval-prompt-data", f"{task.eval}@[0:8]", "--eval-interval", "2", "--use-tensorboard", "--use-wandb"]
    (save.parent / "output.txt").write_text(train(two_epochs(task, save, *extra), save.parent / "log.txt"))
    return save


def weights(directory: Path) -> dict[str, bytes]:
    reader = HFReader(directory)
    return {name: reader.get(name).numpy().tobytes() for name in reader.names()}


def test_engines_and_trainers_agree_after_every_update(unbroken: Path) -> None:
    gaps = events(unbroken, GAP)
    assert sorted(gaps) == [1, 2, 3, 4]
    assert max(gaps.values()) <= TOLERANCE, gaps
    assert all(norm > 0 for norm in events(unbroken, "train/grad_norm").values()), "the weights have to move"
    assert list(events(unbroken, "train/staleness").values()) == [0, 0, 0, 0], "and with each sync the version"


def test_epochs_go_over_into_each_other(unbroken: Path) -> None:
    groups = [group for number in range(4) for group in read_dump(unbroken / f"dump/{number}.jsonl")]
    prompts = [str(group[0].prompt) for group in groups]
    assert [len(set(prompts[start : start + 7])) for start in (0, 7)] == [7, 7]
    assert len(prompts) == 16
    assert len(set(prompts)) == 7
    assert not (unbroken / "dump/4.jsonl").exists()
    rates = list(events(unbroken, "train/lr").values())
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8e-3 > 0.2e-3 > rates[-1], "the schedule knows how long the epochs are"
    assert "2 epochs of 7 rows: 4 rollouts" in (unbroken.parent / "output.txt").read_text()


def in_tensorboard(save: Path) -> dict[str, list[tuple[int, float]]]:
    [directory] = (save / "tensorboard").iterdir()
    return scalars(directory)


def in_metrics(save: Path) -> dict[str, list[tuple[int, float]]]:
    """Convert to float32, which TensorBoard stores."""
    return {
        name: [(step, float(np.float32(value))) for step, value in points] for name, points in of_metrics(save).items()
    }


def test_trackers_and_metrics_jsonl_agree(unbroken: Path) -> None:
    assert in_tensorboard(unbroken) == in_metrics(unbroken)
    [rows] = wandb_rows(unbroken)
    assert [row["_step"] for row in rows[1:-1]] == [0, 1, 2, 3, 4]
    assert (rows[0]["num_epoch"], rows[-1]) == (2, {"exit": 0})
    for step in range(1, 5):
        assert rows[1 + step]["train/loss"] == events(unbroken, "train/loss")[step]


def starts(save: Path) -> list[dict[str, Any]]:
    return json.loads((save / "run.json").read_text())["starts"]


def test_the_start_is_recorded(unbroken: Path) -> None:
    [start] = starts(unbroken)
    assert start["rollouts_done"] == 0 and start["versions"]["megatron-core"] and start["host"]["name"]
    assert start["command"][1].endswith("train.py") and "--num-epoch" in start["command"]
    assert "\n".join(start["plan"]) in (unbroken.parent / "output.txt").read_text()
    assert start["run"] == (unbroken / "logs/run_id").read_text()


def test_trackers_end_without_a_traceback(unbroken: Path) -> None:
    output = (unbroken.parent / "log.txt").read_text()
    assert "wandb: Run summary" in output, "it wrote to this output"
    assert "Traceback" not in output and "ConnectionResetError" not in output


def test_a_stopped_start_can_be_repeated(unbroken: Path, tmp_path: Path) -> None:
    """A run that ends before its first checkpoint leaves its other files in --load, which must not refuse them."""
    for path in unbroken.iterdir():
        if path.is_dir() and not path.name.startswith("iter_"):
            (tmp_path / path.name).mkdir()
        elif path.is_file():
            (tmp_path / path.name).touch()
    named_by_flags = [str(tmp_path / "dump/{rollout_id}.jsonl"), str(tmp_path / "hf")]
    assert (tmp_path / RUN_RECORD).exists() and find_checkpoint(tmp_path, own=named_by_flags) is None


def sampled(save: Path) -> list[tuple[int, str, int]]:
    return [(row["step"], row["split"], row["index"]) for row in read_samples(save / "samples.jsonl")]


def test_samples_are_those_of_the_rollouts(unbroken: Path) -> None:
    rows = list(read_samples(unbroken / "samples.jsonl"))
    for rollout_id in range(4):
        samples = [sample for group in read_dump(unbroken / f"dump/{rollout_id}.jsonl") for sample in group]
        assert [
            (row["index"], row["response"], row["reward"], row["response_tokens"], row["policy_versions"])
            for row in rows
            if (row["step"], row["split"]) == (rollout_id + 1, "train")
        ] == [(s.index, s.response, s.reward, s.response_length, [rollout_id + 1] * 2) for s in samples]
    evaluated = [row for row in rows if row["split"] == "eval/eval"]
    assert [(row["step"], row["index"]) for row in evaluated] == [(s, i) for s in (0, 2, 4) for i in range(8)]
    mean = sum(row["reward"] for row in evaluated[-8:]) / 8
    assert mean == pytest.approx(events(unbroken, "eval/eval/reward")[4])


def test_ranks_are_balanced(unbroken: Path) -> None:
    assert max(events(unbroken, "train/dp_imbalance").values()) < 1.1


def test_the_console_says_what_the_run_does(unbroken: Path) -> None:
    """Stages, one line for each rollout from 0 on, and the end with the next commands; driver.log has all of it."""
    output = (unbroken.parent / "output.txt").read_text()
    lines = output[output.index("checking … ") :].splitlines()
    stages = [line.partition(" … ")[0] for line in lines if re.search(r" … [\d.]+ s$| … \d+ min \d\d s$", line)]
    assert [stage for stage in stages if stage != "prompts"] == [
        *("checking", "Ray", "trainers: loading weights", "engines", "first weight sync (checked)")
    ]
    rollouts = [line for line in lines if re.match(r"rollout \d+: reward", line)]
    assert [line.split(": reward")[0] for line in rollouts] == [f"rollout {number}" for number in range(4)]
    assert max(map(len, rollouts)) <= PLAIN_WIDTH
    loss = events(unbroken, "train/loss")[1]
    assert f"loss {number(loss, '.4f')} " in rollouts[0]
    assert all(re.search(r" \| .* s( \w+ \d+%)+$", line) for line in rollouts)
    rewards = events(unbroken, "eval/eval/reward")
    saved = unbroken / "iter_0000003"
    assert lines[-4] == f"model: {saved}  Hugging Face: {unbroken / 'hf'}"
    assert lines[-5].startswith("done: 4/4 rollouts in ") and "start and end" in lines[-5]
    assert lines[-3].startswith(f"eval eval: {rewards[0]:.3f} -> {rewards[4]:.3f} after 4 rollouts")
    assert lines[-2] == f"next: slime plot {unbroken / 'metrics.jsonl'}"
    assert lines[-1].startswith("next: slime answers --before ")
    logged = {line.partition("slime.console: ")[2] for line in (unbroken / "logs/driver.log").read_text().splitlines()}
    assert {*rollouts, *lines[-5:]} <= logged


def test_the_tolerance_notices_another_policy(task: Task, unbroken: Path) -> None:
    """Rollout 3's samples have other log-probs under the policy of rollout 0.

    The metric is the gap between the two, as tests/megatron/test_trainer.py compares to the last digits.
    """
    samples = [sample for group in read_dump(unbroken / "dump/3.jsonl") for sample in group]
    gaps = [(log_probs(task.model, sample) - torch.tensor(sample.rollout_log_probs)).abs() for sample in samples[:4]]
    assert min(float(gap.max()) for gap in gaps) > TOLERANCE


def test_phases_sum_to_the_steps_wall_time(unbroken: Path) -> None:
    for step in range(1, 5):
        parts = {name: events(unbroken, f"time/{name}")[step] for name in (*PHASES, "idle")}
        assert sum(parts.values()) == pytest.approx(events(unbroken, "time/step")[step], abs=1e-6)
        assert all(seconds >= 0 for seconds in parts.values()), parts
        assert parts["generation"] > 0
        assert parts["training"] > 0
        assert parts["weight_sync"] > 0


def test_a_resumed_run_draws_the_same_prompts(task: Task, unbroken: Path, tmp_path: Path) -> None:
    """It has one rank, one engine and another reference model, but its engine has to hold the actor."""
    save = tmp_path / "run"
    copy_checkpoint(unbroken, save, 1)
    extra = ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl")]
    extra += ["--ref-load", str(task.other_model), "--use-kl-loss", "--kl-loss-coef", "0.001"]
    extra += ["--eval-prompt-data", f"{task.eval}@[0:8]", "--eval-interval", "2", "--use-tensorboard", *SMALL]
    train(two_epochs(task, save, *extra), tmp_path / "log.txt")
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
    assert in_tensorboard(save) == in_metrics(save), "it also has the metrics from before the resume"
    assert [start["rollouts_done"] for start in starts(save)] == [0, 2]
    assert sampled(save) == sampled(unbroken), "each sample once, also if the killed run had written it already"


def test_replaying_the_samples_gives_the_same_weights(task: Task, unbroken: Path, tmp_path: Path) -> None:
    """Results are equal bit for bit: a checkpoint has optimizer, schedule and data order (control: tests/megatron)."""
    save = tmp_path / "run"
    copy_checkpoint(unbroken, save, 1)
    extra = ["--load-debug-rollout-data", str(unbroken / "dump/{rollout_id}.jsonl"), "--debug-train-only"]
    extra += ["--save-debug-train-data", str(save / "steps")]
    train(two_epochs(task, save, *extra, "--save-hf", str(save / "hf")), tmp_path / "log.txt")
    assert weights(save / "hf") == weights(unbroken / "hf")
    files = StepFiles(save / "steps")
    assert [place.name for place in files.places] == [
        f"rollout {number}{step}" for number in (2, 3) for step in ("", ", step 0")
    ]
    first, last = ({entry.name: entry for entry in files.places[at].tensors} for at in (0, -1))
    tokens = [token for group in read_dump(unbroken / "dump/2.jsonl") for sample in group for token in sample.tokens]
    assert files.tensor(first["tokens"]).tolist() == tokens
    after_last = {
        name: files.tensor(entry).numpy().tobytes() for name, entry in last.items() if name.startswith("weight ")
    }
    assert after_last == {f"weight {name}": content for name, content in weights(unbroken / "hf").items()}


# --- engines and trainers by turns on the same devices -----------------------------------------------------------


@pytest.fixture(scope="module")
def colocated(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unbroken run's rollouts, with --colocate."""
    save = tmp_path_factory.mktemp("colocated") / "run"
    extra = ["--save-hf", str(save / "hf"), "--eval-prompt-data", f"{task.eval}@[0:4]", "--eval-interval", "2"]
    extra += ["--update-weight-buffer-size", "300000", "--colocate"]
    arguments = without(two_epochs(task, save, *extra), "--rollout-num-gpus")
    (save.parent / "output.txt").write_text(train(arguments, save.parent / "log.txt"))
    return save


def test_colocation_trains_as_apart_to_the_bit(task: Task, unbroken: Path, colocated: Path) -> None:
    """The first sync was proven by checksum, or the run had ended; later ones are proven by the policy version."""
    assert weights(colocated / "hf") == weights(unbroken / "hf")
    assert weights(colocated / "hf") != weights(task.model), "it has learned"


def test_policies_agree_and_phases_report_memory(colocated: Path) -> None:
    assert len(events(colocated, "train/logprob_gap_mean")) == 4
    assert max(events(colocated, GAP).values()) <= TOLERANCE
    assert all(seconds > 0 for seconds in events(colocated, "time/offload").values())
    for phase in MEASURED:
        peaks = events(colocated, f"memory/{phase}_peak_gb")
        assert peaks and all(0.05 < peak < 8 for peak in peaks.values()), phase
