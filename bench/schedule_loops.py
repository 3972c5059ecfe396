"""train.py against train_async.py, with timed sleeps instead of the engines' forward passes and the trainer's compute.

- Where it sits: `rollout_schedule` starts the engines, which all runs use one after the other. Each run is a real one:
  Ray, rollout manager, router, a Megatron trainer of a tiny model, weight syncs. The trainer sleeps in the function
  that computes advantages (--custom-advantage-function-path).
- Invariant: both loops get the same engines, prompts, batch and training time. Steps at the start and the end, where a
  pipeline fills and empties, count for neither.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.common import ROOT, Goal, Spread, Table
from slime.config.args import Args
from slime.core.batch import Array, TrainBatch
from slime.observability.metrics_log import read_metrics

if TYPE_CHECKING:
    from bench.rollout_schedule import Engines

GOAL_HIDDEN = 0.8
SECONDS_A_SAMPLE = 0.02
"""Training seconds per sample."""
RUN_TIMEOUT = 600.0
"""Seconds in which one run must end."""
PROGRAMS = ("train.py", "train_async.py")
PHASES = ("rollout", "training", "weight_sync")
"""Phases of a step. `rollout` lasts from its first request to its last reward, whether or not anything waits for it."""


def timed_advantages(args: Args, batch: TrainBatch) -> Array:
    """Sleep for the time of a training step, and return advantages of 0."""
    time.sleep(SECONDS_A_SAMPLE * len(batch))
    return np.zeros(int(batch.response_lengths_N.sum()), dtype=np.float32)


@dataclass
class Run:
    """The seconds of each counted step, the means of its phases, and the share of tokens from older weights."""

    steps: list[float]
    phases: dict[str, float]
    off_policy: float


def loop_flags(engines: Engines, directory: Path, *, rollouts: int) -> list[str]:
    """Return the flags of both programs."""
    shape = engines.shape
    return [
        *("--hf-checkpoint", str(engines.model), "--ref-load", str(engines.model)),
        *("--rollout-external-engines", *engines.urls),
        *("--prompt-data", str(engines.prompts), "--rollout-shuffle", "--rm-type", "random"),
        *("--rollout-batch-size", str(shape.prompts), "--n-samples-per-prompt", str(shape.samples)),
        *("--rollout-max-response-len", str(engines.timing.cap), "--num-rollout", str(rollouts)),
        *("--custom-advantage-function-path", f"{__name__}.timed_advantages"),
        *("--actor-num-gpus-per-node", "1", "--cpu-threads-per-process", "1", "--lr", "1e-9"),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "8192", "--log-dir", str(directory)),
        *("--save-interval", "0"),
    ]


def run_loop(program: str, engines: Engines, directory: Path, *, rollouts: int, skip: int) -> Run:
    """Run that many rollouts once; the first `skip` steps and the last one do not count."""
    command = [sys.executable, str(ROOT / program), *loop_flags(engines, directory, rollouts=rollouts)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    directory.mkdir(parents=True)
    log = directory / "output.txt"
    with log.open("wb") as file:
        code = subprocess.call(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=RUN_TIMEOUT
        )
    if code != 0:
        raise RuntimeError(f"{program} ended with code {code}:\n{log.read_text()[-4000:]}")
    steps: dict[int, dict[str, float]] = {}
    for record in read_metrics(directory / "metrics.jsonl"):
        steps.setdefault(int(record["step"]), {}).update(record)
    counted = [steps[number] for number in sorted(steps)][skip:-1]
    return Run(
        steps=[step["time/step"] for step in counted],
        phases={name: statistics.fmean(step[f"time/{name}"] for step in counted) for name in PHASES},
        off_policy=statistics.fmean(step["train/offpolicy_tokens"] for step in counted),
    )


def hidden_share(sync: Run, other: Run) -> float:
    """Return the share of the shorter phase (rollout or training in the synchronous loop) that the other loop saves."""
    shorter = min(sync.phases["rollout"], sync.phases["training"])
    return (statistics.fmean(sync.steps) - statistics.fmean(other.steps)) / shorter


def compare_loops(
    engines: Engines, directory: Path, *, pairs: int, rollouts: int, skip: int
) -> tuple[Table, Goal, dict[str, list[Run]]]:
    """Run both loops in turns, A B A B."""
    runs: dict[str, list[Run]] = {program: [] for program in PROGRAMS}
    for number in range(pairs):
        for program, found in runs.items():
            place = directory / f"{program.removesuffix('.py')}-{number}"
            found.append(run_loop(program, engines, place, rollouts=rollouts, skip=skip))
    batch = engines.shape.batch
    table = Table(
        "Whole loops",
        [
            "loop",
            "rollouts/s",
            "seconds a step",
            *(name.replace("_", " ") for name in PHASES),
            "phases overlap",
            "tokens off-policy",
        ],
        note=(
            f"A training step takes {SECONDS_A_SAMPLE * batch:.2f} s of sleep, and what its processes need; plain "
            f"rollouts. Means over {rollouts - skip - 1} steps of each of {pairs} runs."
        ),
    )
    for program, found in runs.items():
        rates = Spread.of(batch / statistics.fmean(run.steps) for run in found)
        steps = Spread.of(step for run in found for step in run.steps)
        row = [program, rates.show(1), steps.show(2)]
        row += [f"{statistics.fmean(run.phases[name] for run in found):.2f}" for name in PHASES]
        row.append(f"{statistics.fmean(sum(run.phases.values()) - statistics.fmean(run.steps) for run in found):.2f}")
        table.rows.append([*row, f"{statistics.fmean(run.off_policy for run in found):.0%}"])
    hidden = Spread.of(map(hidden_share, *runs.values()))
    table.rows.append(["**of the shorter side hidden**", f"**{hidden.show(2)}**", *[""] * (len(table.columns) - 2)])
    return table, Goal("async: share of the shorter side hidden", hidden.median, GOAL_HIDDEN), runs
