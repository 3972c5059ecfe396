"""Whole runs that lose processes, or a disk: they continue, or end with one message that names what was lost."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from slime.megatron.checkpoint.files import find_checkpoint
from slime.rollout.dump import read_dump
from tests.cluster.runs import Task, events, family, flags, start, wait_for
from tests.cluster.test_life_and_death import assert_all_gone

LENGTH_S = 240.0
"""Seconds in which a run has to do all that a test waits for."""
HUNG_S = 8
"""Seconds after which an engine counts as hung in these tests."""


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
            return len(re.findall(f"^{line}", self.output, re.MULTILINE)) >= count

        wait_for(there, line, LENGTH_S)

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

        wait_for(ended, "the end", LENGTH_S)
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


def test_a_run_survives_its_engines_and_its_router(task: Task, tmp_path: Path) -> None:
    """Both engines are killed at once, then one hangs while the router is killed: no prompt and no weight is lost.

    With both gone, generation waits for the first one to get the weights, and the second gets them while the first one
    generates.
    """
    save = tmp_path / "run"
    extra = ["--num-rollout", "6", "--rollout-max-response-len", "150", "--engine-health-timeout", str(HUNG_S)]
    extra += ["--actor-num-gpus-per-node", "1"]
    extra += ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl")]
    with running(flags(task, save, *extra), tmp_path / "log.txt") as run:
        run.wait_for("rollout 1:")
        for engine in (0, 1):
            run.under_guard(f"engine-{engine}.log").kill()
        run.wait_for("rollout 2:")
        run.under_guard("engine-0.log").send_signal(signal.SIGSTOP)
        run.under_guard("router.log").kill()
        assert run.finish() == 0, run.output[-4000:]
        output = run.output
    for engine in (0, 1):
        assert re.search(rf"^FAULT engine {engine} \(http\S+ has died; its log is \S+engine-{engine}.log", output, re.M)
    assert "FAULT engine 0 generates again" in output
    assert re.search(rf"^FAULT engine 0 \(http\S+ has answered no health check for {HUNG_S} s", output, re.M)
    assert re.search(r"^FAULT the router \(http\S+ has died; its log is \S+router.log", output, re.M)
    assert sum(events(save, "fault/engine_restarts").values()) == 3
    assert sum(events(save, "fault/router_restarts").values()) == 1
    groups = [group for number in range(6) for group in read_dump(save / f"dump/{number}.jsonl")]
    assert [group[0].group_index for group in groups] == list(range(24)), "each prompt once, in its rollout"
    assert all(sample.policy_versions for group in groups for sample in group)
    versions = [{v for s in group for v in s.policy_versions or []} for group in groups]
    assert versions == [{1 + index // 4} for index in range(24)], "a restarted engine has the run's weights"
    gaps = events(save, "train/logprob_gap_max")
    assert sorted(gaps) == list(range(1, 7))
    assert max(gaps.values()) <= 1e-4, "... and computes what the trainers compute"


def test_a_run_restarts_after_a_lost_trainer(task: Task, tmp_path: Path) -> None:
    save = tmp_path / "run"
    extra = ["--num-rollout", "4", "--save-interval", "2", "--rollout-num-gpus", "1"]
    extra += ["--save-debug-rollout-data", str(save / "dump/{rollout_id}.jsonl")]
    with running(flags(task, save, *extra), tmp_path / "log.txt") as run:
        run.wait_for("saved ")
        run.actor("TrainWorker", 1).kill()
        run.wait_for("starting again from .*, after rollout 1 ")
        assert run.finish() == 0, run.output[-4000:]
        output = run.output
    assert re.search(r"^FAULT .* failed: trainer \d \(its log is \S+trainer-\d.log\) died", output, re.M)
    assert output.count("restart 1 of --max-restarts 2") == 1
    assert events(save, "fault/run_restarts") == {2: 1}
    assert sorted(events(save, "rollout/reward")) == [1, 2, 3, 4]
    groups = [group for number in range(4) for group in read_dump(save / f"dump/{number}.jsonl")]
    assert [group[0].group_index for group in groups] == list(range(16))
    assert max(events(save, "train/logprob_gap_max").values()) <= 1e-4


def test_a_full_disk_leaves_the_last_checkpoint(task: Task, tmp_path: Path) -> None:
    save = tmp_path / "disk"
    save.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(save)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode:
        pytest.skip("no file system of a set size can be made here: that takes root's rights")
    try:
        extra = ["--num-rollout", "9", "--save-interval", "1", "--actor-num-gpus-per-node", "1"]
        extra += ["--rollout-num-gpus", "1", "--log-dir", str(tmp_path / "logs")]
        with running(flags(task, save, *extra), tmp_path / "log.txt") as run:
            assert run.finish() == 1
            output = run.output
        found = find_checkpoint(save)
        assert found is not None
        assert found.rollout_id is not None
        failed = found.rollout_id + 1
        assert f"saved {save}/iter_{found.rollout_id:07d}" in output
        assert f"rollout {failed}: saving failed: trainer 0" in output
        assert re.search(rf"saving to {save} failed: .*(No space left on device|0 MiB are free there)", output)
        assert "starting again" not in output, "it would be as full again"
        assert "Traceback" not in output
        assert [path.name for path in save.iterdir() if path.name.startswith(".tmp")] == []
    finally:
        subprocess.run(["umount", str(save)], check=True)
