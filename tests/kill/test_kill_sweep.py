"""A small kill sweep: one kill while a checkpoint is written, and controls that every kind of difference is noticed.

The runs are --deterministic, and the killed one has one engine where the unbroken one has two.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from slime.config.sampling_record import read_record
from slime.observability.metrics_log import read_metrics
from tests.cluster.hooks_for_tests import DAEMON
from tests.cluster.runs import ROOT, Task, shared_task
from tests.cluster.test_life_and_death import assert_no_trace, new_marker, temporary_files
from tests.kill import life as phases
from tests.kill.compare import DUMPS, differences, is_measured
from tests.kill.life import Life, Span
from tests.kill.one_run import Run
from tests.kill.sweep import DRIVER, SAVE, VICTIMS, Kill, broken, command, draw

SMALL = ("--num-rollout", "2", "--actor-num-gpus-per-node", "1", "--rm-num-workers", "1")
SMALL += ("--update-weight-buffer-size", "1000000")
ONE_ENGINE = ("--rollout-num-gpus", "1")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return shared_task(tmp_path_factory)


@pytest.fixture(scope="module")
def new_run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []
    directory = tmp_path_factory.mktemp("runs")

    def make(name: str, *extra: str) -> Run:
        words = [sys.executable, str(ROOT / "train.py"), *command(task, directory / name / SAVE, *SMALL, *extra)]
        runs.append(Run(directory / name, words, limit=300.0))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing has happened to, and what was seen of it meanwhile."""

    save: Path
    writes: list[Span]
    engines: list[str]
    """The engines' command lines."""


def engines_of(run: Run) -> list[str]:
    """Return the command lines of the run's engines, without those of the processes that guard them."""
    found: list[str] = []
    for process in run.processes():
        with suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    return [words for words in found if "embedded.server" in words and "guard.py" not in words]


@pytest.fixture(scope="module")
def unbroken(new_run: Callable[..., Run]) -> Unbroken:
    run = new_run("unbroken")
    life = Life(run.start(), run.directory / SAVE)
    engines: list[str] = []
    while not run.ended:
        if life.look().phase == phases.TRAINING and not engines:
            engines = engines_of(run)
        time.sleep(phases.POLL_S)
    assert run.wait() == 0, run.log[-4000:]
    return Unbroken(run.directory / SAVE, life.writes, engines)


@pytest.mark.timeout(900)  # three starts of a run, while other tests run
def test_a_run_killed_during_a_write_resumes_exactly(new_run: Callable[..., Run], unbroken: Unbroken) -> None:
    """Before it is started again, nothing is left of it but its directory; its hook has left a daemon."""
    write = unbroken.writes[1]
    kill = Kill(DRIVER, 0, phases.WRITE, 1, share=0.3, span_seconds=write.end - write.start, restarts=False)
    hook = ("--custom-rollout-log-function-path", "tests.cluster.hooks_for_tests.leave_a_daemon")
    run = new_run("killed", *ONE_ENGINE, *hook)
    with pytest.MonkeyPatch.context() as patch, temporary_files(patch) as temporary:
        patch.setenv(marker := new_marker(), "1")

        def check(save: Path) -> None:
            assert (save / DAEMON).exists(), "control: there was a daemon, which has the marker too"
            assert_no_trace(marker, temporary, save)

        outcome = broken(run, kill, unbroken.save, check)
        assert outcome.problem is None
        assert outcome.hit.startswith(phases.WRITE)
        assert outcome.went_on == "started again"
        assert outcome.differences == []
        assert_no_trace(marker, temporary, run.directory / SAVE)


def test_every_engine_is_a_deterministic_one(unbroken: Unbroken) -> None:
    """Another engine's log-probs depend on other requests, as tests/engine/test_deterministic_engine.py shows.

    `test_the_comparison_notices` shows that a difference in their last bits would be noticed.
    """
    assert ["--enable-deterministic-inference" in words for words in unbroken.engines] == [True, True]


def test_a_dump_records_how_it_was_sampled(unbroken: Unbroken) -> None:
    record = read_record(unbroken.save / DUMPS / "0.jsonl")
    assert record is not None and record.sampling is not None and record.tokenizer is not None


def spoil_a_token(run: Path) -> None:
    path = run / "dump/1.jsonl"
    record, first, *others = path.read_text().splitlines()
    group = json.loads(first)
    group[0]["tokens"][-1] += 1
    path.write_text("\n".join([record, json.dumps(group), *others]))


def spoil_a_log_prob(run: Path) -> None:
    path = run / "dump/0.jsonl"
    record, first, *others = path.read_text().splitlines()
    group = json.loads(first)
    group[-1]["rollout_log_probs"][0] *= 1 + 1e-15
    path.write_text("\n".join([record, json.dumps(group), *others]))


def spoil_a_metric(run: Path) -> None:
    events = read_metrics(run / "metrics.jsonl")
    last = next(event for event in reversed(events) if "train/loss" in event)
    last["train/loss"] += 1e-15
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def spoil_an_event(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[-2]]))


def spoil_a_weight(run: Path) -> None:
    path = max(run.glob("iter_*")) / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_an_export(run: Path) -> None:
    shutil.rmtree(run / "hf/1")


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (spoil_a_token, "samples"),
        (spoil_a_log_prob, "samples"),
        (spoil_a_metric, "metrics"),
        (spoil_an_event, "metrics"),
        (spoil_a_weight, "tensors"),
        (spoil_an_export, "exports"),
    ],
)
def test_the_comparison_notices(unbroken: Unbroken, tmp_path: Path, spoil: Callable[[Path], None], kind: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(unbroken.save, other)
    assert differences(unbroken.save, other) == []
    spoil(other)
    found = differences(unbroken.save, other)
    assert [text.split(":")[0] for text in found] == [kind] * len(found) != []


@pytest.mark.parametrize("key", ["time/training", "memory/training_peak_gb", "sync/gb", "rollout/tokens_per_second"])
def test_what_depends_on_the_clock_is_left_out(key: str) -> None:
    assert is_measured(key)


@pytest.mark.parametrize("key", ["rollout/tokens", "train/loss", "eval/eval/reward", "rollout/surplus_groups"])
def test_nothing_else_is_left_out(key: str) -> None:
    assert not is_measured(key)


def test_the_sweep_reaches_every_victim_and_phase() -> None:
    spans = [Span(phase, number, 0.0, 1.0) for phase in phases.PHASES for number in range(4)]
    kills = draw(45, 0, spans)
    assert kills == draw(45, 0, spans) != draw(45, 1, spans)
    stops, kills = [kill for kill in kills if kill.stops], [kill for kill in kills if not kill.stops]
    assert {(stop.phase, len(stop.signals)) for stop in stops} == {
        (phase, n) for phase in phases.PHASES for n in (1, 2)
    }
    assert {(stop.signals[0], stop.to_group) for stop in stops} == {
        (number, to_group) for number in (signal.SIGINT, signal.SIGTERM) for to_group in (True, False)
    }
    assert {stop.phase for stop in stops if stop.seldom} == set(phases.PHASES)
    assert {kill.phase for kill in kills} == set(phases.PHASES)
    for phase in (phases.WRITE, phases.SYNC):
        assert {kill.victim for kill in kills if kill.phase == phase} == set(VICTIMS)
    lost = [kill for kill in kills if kill.victim != DRIVER]
    assert {kill.restarts for kill in lost} == {True, False}
    assert not any(kill.restarts for kill in kills if kill.victim == DRIVER), "nobody is there to start it again"
    assert {kill.victim for kill in kills if kill.again is not None} == {DRIVER}
    assert [kill.phase for kill in kills[:2]] == [phases.WRITE, phases.SYNC]
