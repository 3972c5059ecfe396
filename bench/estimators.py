"""The demo's task learned with every advantage estimator: the result after the same number of rollouts, and the curve.

    python -m bench.estimators [--only gspo rloo] [--rollouts 50]      (make bench-estimators)

Each run is scripts/run-glm4-tiny-cpu.sh from one supervised start, with the flags in the table; the MoE model has its
own script and start. Invariant: start, problems, batch, learning rate and seed are the same for all; an estimator's own
flags are in `RUNS` and in the table. The table has every run that finished and is still in outputs/, so --only adds to
it, and a failed run removes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from bench.common import OUTPUTS, ROOT, Goal, Table, machine, write_result
from slime.observability.metrics_log import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOAL = 0.8
CURVES = ROOT / "docs" / "estimators.png"
TWO_STEPS = ("--num-steps-per-rollout", "2")
"""With two steps, the ratio to the old policy is not 1 everywhere, so that clipping has an effect."""


@dataclass(frozen=True)
class Setup:
    """The settings that differ between runs."""

    flags: Sequence[str]
    model: str = "glm4"
    longest: int | None = None
    """The largest number of rollouts, if more would find nothing left to learn."""
    teacher: str = "sft_torch_dist"
    """The checkpoint inside `start` that --ref-load names."""

    @property
    def script(self) -> str:
        return f"scripts/run-{self.model}-tiny-cpu.sh"

    @property
    def start(self) -> Path:
        """The directory that `make demo` has made."""
        return ROOT / "outputs" / ("demo-seed1" if self.model == "glm4" else f"demo-{self.model}-seed1")


RUNS: Mapping[str, Setup] = {
    "grpo": Setup(("--advantage-estimator", "grpo")),
    "Dr. GRPO": Setup(
        ("--advantage-estimator", "grpo", "--disable-grpo-std-normalization", "--calculate-per-token-loss")
    ),
    "DAPO": Setup(
        (
            *("--advantage-estimator", "grpo", "--calculate-per-token-loss", "--eps-clip-high", "0.28"),
            "--dynamic-sampling-filter-path",
            "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
            *TWO_STEPS,
        ),
        longest=30,
    ),
    "gspo": Setup(("--advantage-estimator", "gspo", "--eps-clip", "3e-3", "--eps-clip-high", "4e-3", *TWO_STEPS)),
    "cispo": Setup(("--advantage-estimator", "cispo", *TWO_STEPS)),
    "rloo": Setup(("--advantage-estimator", "rloo")),
    "reinforce_plus_plus": Setup(("--advantage-estimator", "reinforce_plus_plus", "--kl-coef", "0.001")),
    "reinforce_plus_plus_baseline": Setup(("--advantage-estimator", "reinforce_plus_plus_baseline")),
    "ppo": Setup(("--advantage-estimator", "ppo", "--critic-lr", "1e-3", *TWO_STEPS)),
    "on_policy_distillation, from the demo's trained model": Setup(
        ("--advantage-estimator", "on_policy_distillation"), teacher="trained_hf"
    ),
    "grpo, mixture of experts": Setup(("--advantage-estimator", "grpo"), model="qwen3-moe"),
}
DATASETS = ("greedy", "sampled")
DONE = "rollouts.json"
"""A file next to a finished run: its number of rollouts and its seed."""


def run(name: str, out: Path, *, rollouts: int, seed: int) -> None:
    """Run one estimator; its metrics stay in `out`.

    Raises:
        RuntimeError: the run failed.
    """
    setup = RUNS[name]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TASK_DIR": str(setup.start / "task"),
        "HF_DIR": str(setup.start / "sft/hf"),
        "REF_DIR": str(setup.start / setup.teacher),
        "SAVE_DIR": str(out / "run"),
        "SEED": str(seed),
    }
    rollouts = min(rollouts, setup.longest or rollouts)
    command = ["bash", setup.script, *setup.flags, "--num-rollout", str(rollouts)]
    with (out / "log").open("wb") as log:
        code = subprocess.call(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if code != 0:
        raise RuntimeError(f"{name}: the run ended with code {code}; see {out / 'log'}")
    (out / DONE).write_text(json.dumps({"rollouts": rollouts, "seed": seed}))


def curve(events: Sequence[Mapping[str, float]], dataset: str) -> tuple[list[float], list[float]]:
    """Return (rollouts done, mean reward) of each evaluation."""
    key = f"eval/{dataset}/reward"
    found = [(event["step"], event[key]) for event in events if key in event]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for panel, dataset in zip(panels, DATASETS, strict=True):
        for number, (name, events) in enumerate(runs.items()):
            panel.plot(*curve(events, dataset), "o-" if number < 10 else "o--", markersize=3, label=name)
        panel.set(title=f"held-out problems, {dataset}", xlabel="rollouts finished", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.25)
    panels[1].legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def directory(name: str) -> Path:
    model = RUNS[name].model
    own = "" if model == "glm4" else f"-{model}"
    return OUTPUTS / "estimators" / f"{name.split(',')[0].replace(' ', '')}{own}"


def tabulate(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[Table, list[Goal]]:
    columns = ["run", "flags", *(f"{name}, before → after" for name in DATASETS), "rollouts"]
    table = Table("Mean reward on held-out problems, before the first and after the last rollout of 32 x 8", columns)
    goals: list[Goal] = []
    for name, events in runs.items():
        curves = {dataset: curve(events, dataset)[1] for dataset in DATASETS}
        rollouts = sum("time/step" in event for event in events)
        reached = [f"{values[0]:.3f} → {values[-1]:.3f}" for values in curves.values()]
        table.rows.append([name, f"`{' '.join(RUNS[name].flags)}`", *reached, str(rollouts)])
        goals.append(Goal(f"{name}: greedy", curves["greedy"][-1], GOAL))
    return table, goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS), help="none: only the table")
    parser.add_argument("--rollouts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for setup in (RUNS[name] for name in args.only):
        if not (setup.start / "sft/hf").is_dir():
            model = "" if setup.model == "glm4" else f"MODEL={setup.model}-tiny "
            sys.exit(f"{setup.start}: no supervised start there; run `{model}make demo` first")
    facts = machine()
    failed: list[str] = []
    for name in args.only:
        try:
            run(name, directory(name), rollouts=args.rollouts, seed=args.seed)
        except RuntimeError as error:
            failed.append(str(error))
            print(error, flush=True)
    done = [name for name in RUNS if (directory(name) / DONE).is_file()]
    runs = {name: read_metrics(directory(name) / "run" / "metrics.jsonl") for name in done}
    if not runs:
        sys.exit("no run came to its end")
    draw(runs, CURVES)
    raw = {name: {dataset: curve(events, dataset) for dataset in DATASETS} for name, events in runs.items()}
    table, goals = tabulate(runs)
    write_result(OUTPUTS / "estimators.json", [table], goals, facts, raw)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
