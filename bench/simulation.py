"""How well `slime plan --simulate` predicts a run: the second half of its rollouts from the first half.

    python -m bench.simulation [--parts computed timed] [--out DIR]

- Each run is a whole one: Ray, router, rollout manager, engines, trainer. `computed`: a tiny model on this machine's
  cores. `timed`: engines and trainer sleep for known times (`timed_engine`, `schedule_loops`), so that other load on
  the machine matters less.
- Invariant: a prediction reads only args.yaml, and the samples and metrics of the first half. A run that is there
  already (metrics.jsonl in its directory) is read and not made again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.common import OUTPUTS, ROOT, Table
from bench.rollout_schedule import Engines, Shape
from bench.schedule_loops import loop_flags
from bench.timed_engine import Timing
from slime.cli.train import train
from slime.cli.train_async import train as train_async
from slime.config.args import Args, FrozenMapping
from slime.config.parse import load_args
from slime.core.verbs import Story
from slime.observability.metrics_log import read_metrics
from slime.simulate.loop import Step, run_story
from slime.simulate.recorded import lengths_of, measured, read_run
from slime.simulate.speeds import with_flags
from slime.simulate.study import counted

STORIES: dict[int, Story] = {0: train, 1: train_async}
PROGRAMS = ("train.py", "train_async.py")
ROLLOUTS = 10
SIMULATED = 40
"""Simulated rollouts, whose mean is the prediction."""
GOAL = 0.15
"""The largest relative error of a prediction."""
ALL_SAMPLES = ("--log-samples-per-rollout", "100000", "--save-interval", "0", "--num-rollout", str(ROLLOUTS))
COMPUTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "over-sampling": (
        "train.py",
        ("--rollout-batch-size", "16", "--rollout-max-response-len", "64", "--over-sampling-batch-size", "20"),
    ),
    "partial": (
        "train.py",
        (
            *("--rollout-batch-size", "12", "--rollout-max-response-len", "128"),
            *("--over-sampling-batch-size", "18", "--partial-rollout"),
        ),
    ),
    "ahead": ("train_async.py", ("--rollout-batch-size", "12", "--rollout-max-response-len", "128")),
}


@dataclass(frozen=True)
class Run:
    """One real run: its name, program and flags, and the slots of its engines, if they are not the flags' own."""

    name: str
    program: str
    flags: Sequence[str]
    directory: Path
    slots: int | None = None

    def make(self) -> None:
        """Run it, unless it is there."""
        if (self.directory / "metrics.jsonl").exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        command = [sys.executable, str(ROOT / self.program), *self.flags, "--log-dir", str(self.directory)]
        with (self.directory / "output.txt").open("wb") as file:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)

    def args(self) -> Args:
        """Return the plan of the second half, which takes lengths and speeds from the first."""
        words = [*self.flags, "--log-dir", str(self.directory), "--dry-run"]
        args, _ = load_args(words, rollouts_ahead=PROGRAMS.index(self.program))
        if self.slots is not None:
            args = replace(args, sglang=FrozenMapping({"max_running_requests": self.slots}))
        return replace(args, simulate_run=str(self.directory), simulate_run_rollouts=ROLLOUTS // 2)


def predicted(run: Run) -> list[Step]:
    """Return simulated steps with the lengths and speeds of the first half."""
    args = run.args()
    real = read_run(args)
    assert real is not None
    lengths, _ = lengths_of(args, real)
    speeds = with_flags(args, measured(real, STORIES, lengths), lengths)
    steps = run_story(STORIES[args.rollouts_ahead], real.args, speeds, lengths, num_rollouts=SIMULATED)
    return counted(real.args, steps)


def row(run: Run, load: str) -> list[str]:
    """Return the line of one run: its measured halves, the prediction, and the error."""
    times: dict[int, float] = {}
    for event in read_metrics(run.directory / "metrics.jsonl"):
        if "time/step" in event:
            times[int(event["step"])] = event["time/step"]
    last = ROLLOUTS - 1 if run.program == "train_async.py" else ROLLOUTS
    first = [times[step] for step in range(2, ROLLOUTS // 2 + 1)]
    second = [times[step] for step in range(ROLLOUTS // 2 + 1, last + 1)]
    mean = statistics.fmean(second)
    ours = statistics.fmean(step.times["time/step"] for step in predicted(run))
    spread = f"{min(second):.2f}–{max(second):.2f}"
    found = [f"{value:.2f}" for value in (statistics.fmean(first), ours, mean)]
    return [run.name, run.program, *found, spread, f"{ours / mean - 1:+.0%}", load]


def computed_runs(out: Path) -> list[Run]:
    """Return the runs of a tiny model; its task is made if it is not there."""
    task = out / "task"
    if not task.exists():
        make = [sys.executable, "-m", "slime.cli.arithmetic.make_task", "--out", str(task), "--seed", "1"]
        subprocess.run(make, cwd=ROOT, check=True)
    common = ["--hf-checkpoint", str(task / "model"), "--prompt-data", str(task / "train.jsonl"), *ALL_SAMPLES]
    common += ["--rm-type", "random", "--rollout-engine", "embedded", "--no-bf16", "--n-samples-per-prompt", "8"]
    common += ["--rollout-num-gpus", "1"]
    return [Run(name, program, [*common, *flags], out / name) for name, (program, flags) in COMPUTED.items()]


def timed_runs(engines: Engines, out: Path) -> list[Run]:
    """Return a run of each loop with engines and a trainer that sleep."""
    runs: list[Run] = []
    for program in PROGRAMS:
        directory = out / f"timed-{program.removesuffix('.py')}"
        words = loop_flags(engines, directory, rollouts=ROLLOUTS)
        flags = [*words[: words.index("--log-dir")], *ALL_SAMPLES]
        runs.append(Run("timed", program, flags, directory, slots=engines.shape.slots))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("computed", "timed"), default=["computed", "timed"])
    parser.add_argument("--out", type=Path, default=OUTPUTS / "simulation")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    columns = ["run", "loop", "first half, s", "predicted, s", "second half, s", "its range", "error", "load"]
    note = f"Seconds of a step. The goal is an error of at most {GOAL:.0%}."
    table = Table("Steps of a run, predicted from its first half", columns, note=note)

    def measure(runs: Sequence[Run]) -> None:
        for run in runs:
            before = os.getloadavg()[0]
            run.make()
            table.rows.append(row(run, f"{before:.1f}–{os.getloadavg()[0]:.1f}"))
            print(" | ".join(table.rows[-1]), flush=True)

    with ExitStack() as stack:
        if "timed" in given.parts:
            timing = Timing(median=64, sigma=1.0, cap=320, step=0.02, prefill_token=12.5e-6)
            engines = Engines(timing, Shape(16, 4, 2, 16), layers=1, hidden=32, stack=stack)
            measure(timed_runs(engines, out))
        if "computed" in given.parts:
            measure(computed_runs(out))
    print(f"\n{table.markdown()}")


if __name__ == "__main__":
    main()
