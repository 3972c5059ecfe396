"""Whole runs that lose processes, or a disk: they continue, or end with one message that names what was lost."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from slime.core.sample import Sample
from slime.megatron.checkpoint.files import find_checkpoint
from slime.rollout.dump import read_dump
from tests.cluster.runs import Task, events, family, flags, start, wait_for
from tests.cluster.test_life_and_death import assert_all_gone

pytestmark = pytest.mark.timeout(900)  # one run, parts of which start five times

HUNG_S = 8
"""Seconds after which an engine counts as hung in these tests."""
LEFT_BYTES = 1 << 20
"""The room on a full disk, in bytes: less than a checkpoint takes."""


class Run:
    """A running train.py, whose processes are found by their role, and get signals by their id."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        self.process = start(arguments, log)
        self.everyone: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, line: str, *, count: int = 1) -> None:
        """Wait until the output has `count` lines that begin with the pattern `line`."""

        def there() -> bool:
            self.look()
            assert self.process.poll() is None, self.output[-4000:]
            return self._count(line) >= count

        wait_for(there, line)

    def wait_for_the_next(self, line: str) -> None:
        self.wait_for(line, count=self._count(line) + 1)

    def _count(self, line: str) -> int:
        return len(re.findall(f"^{line}", self.output, re.MULTILINE))

    def look(self) -> list[psutil.Process]:
        if self.process.poll() is None:
            self.everyone |= {process.pid: process for process in family(self.process.pid)}
        return [process for process in self.everyone.values() if process.is_running()]

    def under_guard(self, log: str) -> psutil.Process:
        """Return the engine or the router that writes this log."""
        [guard] = [one for one in self.look() if _has(one, lambda words: "guard.py" in words[3] and log in words[4])]
        [process] = guard.children()
        return process

    def actor(self, title: str, which: int = 0) -> psutil.Process:
        """Return a process of Ray's, by the class of its actor."""
        found = [one for one in self.look() if _has(one, lambda words: words[0].startswith(f"ray::{title}"))]
        return sorted(found, key=lambda one: one.pid)[which]

    def finish(self) -> int:
        """Wait for the end, check that no process is left, and return the exit code."""

        def ended() -> bool:
            self.look()
            return self.process.poll() is not None

        wait_for(ended, "the end")
        assert_all_gone(list(self.everyone.values()))
        return self.process.wait()


def _has(process: psutil.Process, matches: Callable[[list[str]], bool]) -> bool:
    with suppress(psutil.Error, IndexError):
        return matches(process.cmdline())
    return False


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[Run]:
    run = Run(arguments, log)
    try:
        yield run
    finally:
        for one in run.look():
            with suppress(psutil.NoSuchProcess):
                one.kill()
        run.process.wait()


@dataclass(frozen=True)
class Survivor:
    """A run after all of its faults."""

    save: Path
    logs: Path
    dump: Path
    output: str
    since_full: str | None
    """The output since the disk is full; None if no disk could be made for it."""


@pytest.fixture(scope="module")
def survivor(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    """Give one run every fault in turn: both engines, an engine and the router, a trainer, and at last the disk.

    - Both engines are killed at once: generation waits for the first one to get the weights, and the second gets them
      while the first one generates.
    - Then one hangs while the router is killed.
    - A trainer is killed after a checkpoint, and the run restarts from it.
    - The disk fills up, which ends the run. (Without root's rights there is no disk to fill: the run ends by itself.)
    """
    directory = tmp_path_factory.mktemp("faults")
    save, logs, dump = (directory / name for name in ("disk", "logs", "dump"))
    save.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(save)]
    mounted = subprocess.run(mounting, check=False, capture_output=True).returncode == 0
    try:
        extra = ["--num-rollout", "40" if mounted else "10", "--rollout-max-response-len", "150"]
        extra += ["--engine-health-timeout", str(HUNG_S), "--log-dir", str(logs)]
        extra += ["--save-debug-rollout-data", str(dump / "{rollout_id}.jsonl")]
        with running(flags(task, save, *extra), directory / "log.txt") as run:
            run.wait_for("rollout 0: reward")
            for engine in (0, 1):
                run.under_guard(f"engine-{engine}.log").kill()
            run.wait_for("rollout 1: reward")
            run.under_guard("engine-0.log").send_signal(signal.SIGSTOP)
            run.under_guard("router.log").kill()
            run.wait_for("FAULT engine 0 generates again", count=2)
            run.wait_for_the_next("saved ")  # with the counts of these faults, which a restart must not lose
            run.actor("TrainWorker", 1).kill()
            run.wait_for("starting again from ")
            run.wait_for_the_next("saved ")
            before = len(run.output)
            if mounted:
                fill(save)
            code = run.finish()
            assert code == (1 if mounted else 0), run.output[-4000:]
        yield Survivor(save, logs, dump, run.output, run.output[before:] if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", str(save)], check=True)


def fill(disk: Path) -> None:
    """Fill the file system up to LEFT_BYTES."""
    with (disk / "filler").open("wb") as file, suppress(OSError):
        while shutil.disk_usage(disk).free > LEFT_BYTES:
            file.write(bytes(LEFT_BYTES // 4))
            file.flush()


def groups_of(run: Survivor) -> list[list[Sample]]:
    count = len(list(run.dump.glob("*.jsonl")))
    return [group for number in range(count) for group in read_dump(run.dump / f"{number}.jsonl")]


def test_a_run_survives_its_engines_and_its_router(survivor: Survivor) -> None:
    output, logs = survivor.output, survivor.logs
    for engine in (0, 1):
        assert re.search(rf"^FAULT engine {engine} \(http\S+ has died; its log is \S+engine-{engine}.log", output, re.M)
    assert "FAULT engine 0 generates again" in output
    assert re.search(rf"^FAULT engine 0 \(http\S+ has answered no health check for {HUNG_S} s", output, re.M)
    assert re.search(r"^FAULT the router \(http\S+ has died; its log is \S+router.log", output, re.M)
    assert sum(events(logs, "fault/engine_restarts").values()) == 3
    assert sum(events(logs, "fault/router_restarts").values()) == 1


def test_a_run_restarts_after_a_lost_trainer(survivor: Survivor) -> None:
    output = survivor.output
    assert re.search(r"^FAULT .* failed: trainer \d \(its log is \S+trainer-\d.log\) died", output, re.M)
    assert output.count("restart 1 of --max-restarts 2") == 1
    [last] = re.findall(r"^starting again from .*, after (\d+) rollouts? ", output, re.M)
    assert events(survivor.logs, "fault/run_restarts") == {int(last): 1}


def test_no_fault_loses_a_prompt_or_a_weight(survivor: Survivor) -> None:
    groups = groups_of(survivor)
    assert len(groups) >= 24
    assert [group[0].group_index for group in groups] == list(range(len(groups))), "each prompt once, in its rollout"
    assert all(sample.policy_versions for group in groups for sample in group)
    versions = [{v for s in group for v in s.policy_versions or []} for group in groups]
    assert versions == [{1 + index // 4} for index in range(len(groups))], "a restarted engine has the run's weights"
    rewards, gaps = events(survivor.logs, "rollout/reward"), events(survivor.logs, "train/logprob_gap_max")
    assert sorted(gaps) == sorted(rewards) == list(range(1, len(gaps) + 1))
    assert max(gaps.values()) <= 1e-4, "... and computes what the trainers compute"


def test_a_full_disk_leaves_the_last_checkpoint(survivor: Survivor) -> None:
    save, output = survivor.save, survivor.output
    if survivor.since_full is None:
        pytest.skip("no file system of a set size can be made here: that takes root's rights")
    found = find_checkpoint(save)
    assert found is not None
    assert found.rollout_id is not None
    failed = found.rollout_id + 2
    assert f"saved {save}/iter_{found.rollout_id:07d}" in output
    assert re.search(rf"^rollout {failed}: saving failed: trainer \d", survivor.since_full, re.M)
    assert re.search(
        rf"saving to {save} failed: .*(No space left on device|\d MiB are free there)", survivor.since_full
    )
    assert "starting again" not in survivor.since_full, "it would be as full again"
    assert "Traceback" not in survivor.since_full
    assert [path.name for path in save.iterdir() if path.name.startswith(".tmp")] == []
