"""The chaos run: engines are killed and hang, rewards fail, and the run still learns.

- What it does: it trains the demo's task from its supervised start twice: undisturbed, and with a fault about every
  third rollout.
- Invariant: faults hit processes of the run that was started here, by id. Both runs must have left no process and no
  file before they are compared.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from slime.observability.metrics_log import read_metrics
from tests.cluster.runs import ROOT, environment
from tests.kill.one_run import Run, kill

NUM_ROLLOUTS = 20
EVERY = 3
STANDARD_ERRORS = 3.0
RUN_LIMIT_S = 1200.0
SAVE = "run"
PYTHON_FIRST = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""A PATH on which `python3`, which the scripts call, is this Python."""
KEPT = ("torchinductor_",)
"""Temporary files that are meant to stay: a cache of torch's."""


@dataclass(frozen=True)
class Fault:
    """A fault of one engine while a rollout was generated."""

    rollout: int
    kind: str
    engine: int
    pid: int


@dataclass(frozen=True)
class Start:
    """The demo's problems, and the checkpoint of its supervised start."""

    task: Path
    model: Path

    @classmethod
    def under(cls, directory: Path) -> Start:
        return cls(directory / "task", directory / "sft/hf")


def make_start(directory: Path, seed: int) -> Start:
    """Run the demo's first two stages."""
    start = Start.under(directory)
    directory.mkdir(parents=True, exist_ok=True)
    variables = {"TASK_DIR": str(start.task), "HF_DIR": str(start.model), "SAVE_DIR": str(directory / "sft")}
    env = {**environment(), **variables, "SEED": str(seed), "PATH": PYTHON_FIRST}
    make_task = [sys.executable, "examples/arithmetic/make_task.py", "--out", str(start.task), "--seed", str(seed)]
    with (directory / "log.txt").open("wb") as log:
        for command in (make_task, ["bash", "scripts/run-glm4-tiny-sft-cpu.sh"]):
            subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    return start


class ChaosRun(Run):
    """A shorter form of the demo's GRPO run, with faults if `rng` is given."""

    def __init__(self, directory: Path, start: Start, seed: int, rng: random.Random | None) -> None:
        self.save = directory / SAVE
        self.temporary = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short: Ray's sockets have paths in it
        variables = {
            "TASK_DIR": str(start.task),
            "HF_DIR": str(start.model),
            "REF_DIR": str(start.model),
            "SAVE_DIR": str(self.save),
            "SEED": str(seed),
            "PATH": PYTHON_FIRST,
            "TMPDIR": str(self.temporary),
            **({} if rng is None else {"CHAOS_REWARDS": "1"}),
        }
        extra = [
            *("--num-rollout", str(NUM_ROLLOUTS), "--save-interval", "10", "--eval-interval", str(NUM_ROLLOUTS)),
            *("--custom-rm-path", "tests.chaos.rewards.judge", "--rm-timeout", "3"),
            *("--engine-health-timeout", "10", "--max-engine-restarts", str(NUM_ROLLOUTS), "--max-restarts", "0"),
        ]
        command = ["bash", "scripts/run-glm4-tiny-cpu.sh", *extra]
        super().__init__(directory, command, limit=RUN_LIMIT_S, variables=variables)
        self._rng = rng
        self.faults: list[Fault] = []

    def run(self) -> int:
        """Run to the end, and return the exit code."""
        self.start()
        while not self.ended and self._rng is not None and len(self.faults) < NUM_ROLLOUTS // EVERY:
            self._disturb(self._rng)
            time.sleep(0.05)
        return self.wait()

    def _disturb(self, rng: random.Random) -> None:
        """Send SIGKILL or SIGSTOP to one engine at a random time in about every third rollout."""
        due = 1 + EVERY * len(self.faults)
        if self.log.count("\nrollout ") < due:
            return
        time.sleep(rng.uniform(0, 2.0))
        engines = self.engines()
        if not engines:
            return
        kind = ("killed", "hung")[len(self.faults) % 2]
        number = rng.randrange(len(engines))
        if kill(engines[number], signal.SIGKILL if kind == "killed" else signal.SIGSTOP):
            self.faults.append(Fault(self.log.count("\nrollout "), kind, number, engines[number].pid))

    def engines(self) -> list[psutil.Process]:
        """Return the engines' own processes, without their guards."""
        found: list[psutil.Process] = []
        for process in self.processes():
            try:
                words = process.cmdline()
                serves = "slime.engine.embedded.server" in words and not any("guard" in word for word in words)
                if serves and process.status() != psutil.STATUS_STOPPED:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.create_time())

    def files_left(self) -> list[str]:
        """Return the temporary files that the ended run has left, and remove them."""
        left = sorted(path.name for path in self.temporary.iterdir() if not path.name.startswith(KEPT))
        shutil.rmtree(self.temporary)
        return left

    def evaluations(self) -> dict[str, tuple[float, float]]:
        """Return the last evaluation's reward and standard error by data set."""
        found: dict[str, tuple[float, float]] = {}
        for event in self._events():
            if event["step"] == NUM_ROLLOUTS:
                names = [key.split("/")[1] for key in event if key.startswith("eval/") and key.endswith("/reward")]
                found |= {name: (event[f"eval/{name}/reward"], event[f"eval/{name}/reward_stderr"]) for name in names}
        return found

    def failed_rewards(self) -> dict[str, float]:
        """Return the number of failed rewards of all rollouts, by reason."""
        total: dict[str, float] = {}
        for event in self._events():
            for key, value in event.items():
                if key.startswith("rollout/reward_failed/"):
                    reason = key.rpartition("/")[2]
                    total[reason] = total.get(reason, 0) + value
        return total

    def rollouts(self) -> int:
        return len({event["step"] for event in self._events() if "train/loss" in event})

    def _events(self) -> list[dict[str, float]]:
        path = self.save / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []


def shared_memory() -> set[Path]:
    """Return the files in /dev/shm."""
    return set(Path("/dev/shm").iterdir())


def nobodys(files: set[Path]) -> list[str]:
    """Return those of `files` in /dev/shm that no process has mapped or open, so that a run has left them."""
    used: set[str] = set()
    for process in psutil.process_iter():
        try:
            used |= {file.path for file in process.open_files()} | {each.path for each in process.memory_maps()}
        except psutil.Error:
            continue
    return sorted(path.name for path in files if path.exists() and str(path) not in used)


def compared(undisturbed: ChaosRun, disturbed: ChaosRun) -> list[tuple[str, str, bool]]:
    """Return a row for each data set: its name, both rewards, and whether they differ only by noise."""
    rows: list[tuple[str, str, bool]] = []
    calm, wild = undisturbed.evaluations(), disturbed.evaluations()
    for name in sorted({*calm, *wild}):
        (first, first_error), (second, second_error) = calm[name], wild[name]
        allowed = STANDARD_ERRORS * math.hypot(first_error, second_error)
        figures = f"{first:.3f} ± {first_error:.3f} undisturbed, {second:.3f} ± {second_error:.3f}"
        rows.append((f"eval {name}", f"{figures}; allowed apart {allowed:.3f}", abs(first - second) <= allowed))
    return rows or [("eval", "none was made", False)]
