"""Whole runs of train_async.py: generation during training, weights that change under requests, kill and resume."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.core.sample import Sample
from slime.observability.metrics_log import read_metrics
from slime.observability.phases import PHASES
from slime.rollout.dump import read_dump
from tests.cluster.runs import (
    ROOT,
    RUN_TIMEOUT_S,
    SMALL,
    Task,
    copy_checkpoint,
    events,
    family,
    flags,
    log_probs,
    marked,
    own_ray,
    start,
    train,
    wait_for,
)
from tests.cluster.terminal import CTRL_C, in_a_terminal
from tests.cluster.test_life_and_death import assert_all_gone, assert_no_trace, new_marker, temporary_files
from tests.cluster.test_resume import weights
from tests.cluster.timeline_hooks_for_tests import TRAINING_S, read_spans
from tests.saved_state import as_lists, read_whole

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

PROGRAM = "train_async.py"
HOOKS = "tests.cluster.timeline_hooks_for_tests"
TOLERANCE = 1e-3
"""The largest difference of a log-prob between the engine and Hugging Face."""


def dumped(task: Task, save: Path, *extra: str) -> list[str]:
    """Return flags of a small run that dumps every rollout next to its checkpoints."""
    return flags(task, save, *SMALL, "--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl"), *extra)


def samples_of(save: Path, rollout_id: int) -> list[Sample]:
    return [sample for group in read_dump(save / f"dump/{rollout_id}.jsonl") for sample in group]


def data_side(save: Path, rollout_id: int) -> dict[str, Any]:
    """Return the rollout manager's state in the checkpoint after a rollout."""
    return as_lists(read_whole(save / f"iter_{rollout_id:07d}")["state"]["rollout"])


# --- the sync waits for the rollout in flight -------------------------------------------------------------------


def draining(task: Task, save: Path) -> list[str]:
    """Training takes longer than generation; each save finds a whole rollout that waits to be trained on."""
    extra = ["--deterministic", "--save-hf", str(save / "hf-{rollout_id}")]
    extra += ["--custom-generate-function-path", f"{HOOKS}.generate"]
    extra += ["--custom-advantage-function-path", f"{HOOKS}.advantages"]
    extra += ["--eval-prompt-data", f"{task.eval}@[0:8]", "--eval-interval", "2"]
    return dumped(task, save, *extra)


@pytest.fixture(scope="module")
def drained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rollouts, with checkpoints after the second and the fourth."""
    save = tmp_path_factory.mktemp("drained") / "run"
    train(draining(task, save), save.parent / "log.txt", PROGRAM)
    return save


def test_the_next_rollout_is_generated_during_training(drained: Path) -> None:
    generation, training = read_spans(drained, "generation"), read_spans(drained, "training")
    assert sorted(generation) == sorted(training) == [0, 1, 2, 3]

    def at_once(generated: int, trained: int) -> bool:
        return any(a.overlaps(b) for a in generation[generated] for b in training[trained])

    assert [at_once(r + 1, r) for r in range(3)] == [True] * 3
    assert not any(at_once(r, r) for r in range(4))
    assert not any(at_once(r + 2, r) for r in range(2)), "one ahead, and no more"


def test_hidden_and_waited_times_are_separate(drained: Path) -> None:
    whole, hidden = events(drained, "time/rollout"), events(drained, "time/rollout_hidden")
    waited = events(drained, "time/rollout_waited")
    assert sorted(whole) == [1, 2, 3, 4]
    for step in range(1, 5):
        assert hidden[step] + waited[step] == pytest.approx(whole[step])
    assert hidden[1] < 0.1 * whole[1], "nobody trains before the first"
    for step in (2, 3, 4):  # on a loaded machine a rollout may take longer than the training that hides it
        assert hidden[step] > 0.9 * min(whole[step], TRAINING_S), (hidden, whole)


def test_phases_sum_to_the_steps_wall_time(drained: Path) -> None:
    for step in range(1, 5):
        parts = {name: events(drained, f"time/{name}")[step] for name in (*PHASES, "idle")}
        assert sum(parts.values()) == pytest.approx(events(drained, "time/step")[step], abs=1e-6)
        assert all(seconds >= 0 for seconds in parts.values()), parts
        assert parts["training"] >= TRAINING_S
    assert sorted(events(drained, "eval/eval/reward")) == [0, 2, 4]


def test_every_token_comes_from_the_previous_policy(drained: Path) -> None:
    """Policy version 1 is that of the first rollout; rollout r is trained on as version r + 1."""
    versions = {r: {v for sample in samples_of(drained, r) for v in sample.policy_versions or []} for r in range(4)}
    assert versions == {0: {1}, 1: {1}, 2: {2}, 3: {3}}
    assert list(events(drained, "train/staleness").values()) == [0, 1, 1, 1]
    assert list(events(drained, "train/offpolicy_tokens").values()) == [0, 1, 1, 1]
    means = events(drained, "train/tis_weight")
    assert sorted(means) == [2, 3, 4], "what is off-policy is weighted, by default"
    assert all(0.9 < mean < 1.1 for mean in means.values()), f"1 but for chance: {means}"
    assert sorted(events(drained, "train/logprob_gap_max")) == [1], "of other policies it is no sign of disagreement"


def consumed(*parts: tuple[Path, range]) -> Counter[int]:
    """Return how often each sample was trained on, over runs and their rollouts."""
    return Counter(sample.index for save, rollouts in parts for r in rollouts for sample in samples_of(save, r))


def exact_metrics(save: Path) -> dict[tuple[float, str], float]:
    """Return all metrics by step and name, except those that depend on a clock or a scale."""
    measured = ("time", "memory/", "sync/", "_per_second")
    return {
        (event["step"], name): value
        for event in read_metrics(save / "metrics.jsonl")
        for name, value in event.items()
        if not any(part in name for part in measured)
    }


def type_ctrl_c(task: Task, save: Path) -> str:
    """Type Ctrl-C while the run trains on rollout 2; return what it shows. Its Ray ends with it, and not before."""
    with own_ray() as patch, temporary_files(patch) as temporary:
        patch.setenv(marker := new_marker(), "1")
        with in_a_terminal(draining(task, save), PROGRAM) as terminal:
            wait_for(
                lambda: terminal.process.poll() is not None or (save / "training-2.begun").exists(), "training on 2"
            )
            terminal.type(CTRL_C)
            code, shown = terminal.wait(RUN_TIMEOUT_S)
        assert code == 128 + signal.SIGINT, shown[-4000:]
        assert_no_trace(marker, temporary, save)
    return shown


def test_a_stopped_run_ends_as_the_unbroken(task: Task, drained: Path, tmp_path: Path) -> None:
    """It was killed after rollout 1, stopped by Ctrl-C on rollout 2, and resumed; all is equal bit for bit."""
    save = tmp_path / "run"
    copy_checkpoint(drained, save, 1)
    state = data_side(save, 1)
    assert state["made"]["rollout_id"] == 2
    assert state["data_source"]["in_flight"] == []
    shown = type_ctrl_c(task, save)
    assert "Ctrl-C: rollout 2: training is finished, what was trained is saved" in " ".join(shown.split())
    assert f"all that was trained is saved in {save}/iter_0000002\nresume with:\n" in shown
    assert not (save / "hf-2").exists(), "no save was due"
    assert data_side(save, 2)["made"]["rollout_id"] == 3
    [line] = re.findall(r"^resume with:\n(.*)$", shown, re.MULTILINE)
    words = shlex.split(line)
    assert words[:2] == [sys.executable, str(ROOT / PROGRAM)]
    assert "starting at rollout 3" in train(words[2:], tmp_path / "log.txt", PROGRAM)
    assert 2 not in read_spans(save, "generation"), "it was made before the kill"
    assert [samples_of(save, r) for r in (2, 3)] == [samples_of(drained, r) for r in (2, 3)]
    assert consumed((drained, range(2)), (save, range(2, 4))) == dict.fromkeys(range(64), 1)
    assert weights(save / "hf-3") == weights(drained / "hf-3") != weights(drained / "hf-1")
    assert exact_metrics(save) == exact_metrics(drained)


# --- the sync passes between the requests in flight --------------------------------------------------------------


def aborting(task: Task, save: Path) -> list[str]:
    """Generation takes longer than training: requests are long, and run one at a time."""
    extra = ["--update-weight-pause", "abort", "--sglang-max-running-requests", "1", "--lr", "3e-3"]
    extra += ["--rollout-max-response-len", "64", "--save-interval", "1", "--save-hf", str(save / "hf-{rollout_id}")]
    return dumped(task, save, *extra)


LAST = 4


@pytest.fixture(scope="module")
def interrupted(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rollouts of many, then Ctrl-C, which leaves nothing; a checkpoint and an export after each."""
    save = tmp_path_factory.mktemp("interrupted") / "run"
    with own_ray() as patch, temporary_files(patch) as temporary:
        patch.setenv(marker := new_marker(), "1")
        _interrupt(task, save)
        assert_no_trace(marker, temporary, save)
    return save


def _interrupt(task: Task, save: Path) -> None:
    log = save.parent / "log.txt"
    process = start([*aborting(task, save), "--num-rollout", "1000"], log, PROGRAM)
    tracker = save / "latest_checkpointed_iteration.txt"
    try:
        wait_for(
            lambda: process.poll() is not None or (tracker.exists() and int(tracker.read_text()) >= LAST),
            "the last checkpoint",
        )
        assert process.poll() is None, log.read_text()[-4000:]
        everyone = family(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 128 + signal.SIGINT
        assert_all_gone(everyone)
        assert "Ctrl-C has ended the run" in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()


def test_every_token_names_its_policy(task: Task, interrupted: Path) -> None:
    """Version v is the policy after training on rollout v - 2; version 1 is where the run began."""
    of_two = [
        sample
        for rollout_id in range(1, LAST + 1)
        for sample in samples_of(interrupted, rollout_id)
        if len(set(sample.policy_versions or [])) > 1
    ]
    assert of_two, "no sync fell into a response"
    for sample in of_two[:6]:
        versions = torch.tensor(sample.policy_versions)
        made = torch.tensor(sample.rollout_log_probs)
        assert versions.tolist() == sorted(versions.tolist())
        for version in versions.unique().tolist():
            model = task.model if version == 1 else interrupted / f"hf-{version - 2}"
            gaps = (log_probs(model, sample) - made).abs()
            assert gaps[versions == version].max() < TOLERANCE
            assert gaps[versions != version].mean() > 10 * TOLERANCE, "the other policy is noticed"


def test_a_token_is_one_version_old_at_most(interrupted: Path) -> None:
    for rollout_id in range(LAST + 1):
        versions = {v for sample in samples_of(interrupted, rollout_id) for v in sample.policy_versions or []}
        assert versions <= {max(rollout_id, 1), rollout_id + 1}


@dataclass(frozen=True)
class Failed:
    """A run that went on after a kill in the middle of a rollout, until it could not generate its last rollout."""

    save: Path
    first: int
    """The rollout that was half made when the run was killed."""
    finished: dict[int, list[int]]
    """The tokens of the samples of that rollout that were finished, by sample."""
    num_rollout: int
    code: int
    output: str


@pytest.fixture(scope="module")
def failed(task: Task, interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    directory = tmp_path_factory.mktemp("failed")
    save, log = directory / "run", directory / "log.txt"
    first = next(r for r in range(LAST) if data_side(interrupted, r)["data_source"]["in_flight"]) + 1
    copy_checkpoint(interrupted, save, first - 1)
    state = data_side(save, first - 1)
    assert state["made"] is None
    groups = state["data_source"]["in_flight"]
    done = [sample for group in groups for sample in group if sample["status"] in ("completed", "truncated")]
    extra = ["--num-rollout", str(first + 3), "--custom-generate-function-path", f"{HOOKS}.fail_last"]
    extra += ["--custom-advantage-function-path", f"{HOOKS}.last_but_one_without_end"]
    with own_ray() as patch:
        patch.setenv(marker := new_marker(), "1")
        process = start([*aborting(task, save), *extra], log, PROGRAM)
        try:
            wait_for(lambda: process.poll() is not None or "starting at rollout" in log.read_text(), "the start")
            assert process.poll() is not None or marked(marker) != [], "control"
            code = process.wait(timeout=RUN_TIMEOUT_S)
            wait_for(lambda: marked(marker) == [], "the end of all its processes")
        finally:
            if process.poll() is None:
                process.kill()
    return Failed(save, first, {each["index"]: each["tokens"] for each in done}, first + 3, code, log.read_text())


def test_a_kill_loses_and_repeats_no_prompt(interrupted: Path, failed: Failed) -> None:
    first, last = failed.first, failed.num_rollout - 2
    done = range(first), range(first, last + 1)
    assert consumed((interrupted, done[0]), (failed.save, done[1])) == dict.fromkeys(range(16 * (last + 1)), 1)
    again = {sample.index: sample.tokens for sample in samples_of(failed.save, first)}
    assert all(again[index] == tokens for index, tokens in failed.finished.items()), "finished ones are not made again"


def test_a_failed_rollout_ends_the_run_during_training(failed: Failed) -> None:
    """The run ends at once, and not when the loop needs the rollout: training would take ten minutes."""
    assert failed.code != 0
    assert f"rollout {failed.num_rollout - 1}: generation failed" in failed.output
    assert "no last rollout" in failed.output
    trained = sorted(path.name for path in failed.save.glob("iter_*"))
    assert trained[-1] == f"iter_{failed.num_rollout - 3:07d}", "it was still training on the last but one"
