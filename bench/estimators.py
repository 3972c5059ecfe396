"""The demo's task learned with every advantage estimator: how far each comes in as many rollouts, and its curve.

    python -m bench.estimators [--only gspo rloo] [--rollouts 50]      (make bench-estimators)

Each run is scripts/run-glm4-tiny-cpu.sh from one supervised start with the flags named in the table. Invariant: start,
problems, batch, learning rate and seed are the same in all; what an estimator adds stands in `RUNS` and in the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from bench.common import OUTPUTS, ROOT, Goal, Table, machine, write_result
from slime.observability.metrics_log import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOAL = 0.8
CURVES = ROOT / "docs" / "estimators.png"
TWO_STEPS = ("--num-steps-per-rollout", "2")
"""So that the ratio to the old policy is not 1 everywhere, and clips have something to cut."""
RUNS: Mapping[str, Sequence[str]] = {
    "grpo": ("--advantage-estimator", "grpo"),
    "Dr. GRPO": ("--advantage-estimator", "grpo", "--disable-grpo-std-normalization"),
    "DAPO": (
        *("--advantage-estimator", "grpo", "--calculate-per-token-loss", "--eps-clip-high", "0.28"),
        "--dynamic-sampling-filter-path",
        "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std",
        *TWO_STEPS,
    ),
    "gspo": ("--advantage-estimator", "gspo", "--eps-clip", "3e-3", "--eps-clip-high", "4e-3", *TWO_STEPS),
    "cispo": ("--advantage-estimator", "cispo", *TWO_STEPS),
    "rloo": ("--advantage-estimator", "rloo"),
    "reinforce_plus_plus": ("--advantage-estimator", "reinforce_plus_plus", "--kl-coef", "0.001"),
    "reinforce_plus_plus_baseline": (
        "--advantage-estimator",
        "reinforce_plus_plus_baseline",
    ),
    "ppo": ("--advantage-estimator", "ppo", "--critic-lr", "1e-3", *TWO_STEPS),
}
DATASETS = ("greedy", "sampled")


def run(name: str, start: Path, out: Path, *, rollouts: int, seed: int) -> list[dict[str, float]]:
    """The metrics of one run."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TASK_DIR": str(start / "task"),
        "HF_DIR": str(start / "sft/hf"),
        "REF_DIR": str(start / "sft_torch_dist"),
        "SAVE_DIR": str(out / "run"),
        "SEED": str(seed),
    }
    command = ["bash", "scripts/run-glm4-tiny-cpu.sh", *RUNS[name], "--num-rollout", str(rollouts)]
    with (out / "log").open("wb") as log:
        code = subprocess.call(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if code != 0:
        raise RuntimeError(f"{name}: the run ended with code {code}; see {out / 'log'}")
    return read_metrics(out / "run" / "metrics.jsonl")


def curve(events: Sequence[Mapping[str, float]], dataset: str) -> tuple[list[float], list[float]]:
    """(rollouts done, mean reward) of each evaluation."""
    key = f"eval/{dataset}/reward"
    found = [(event["step"], event[key]) for event in events if key in event]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for panel, dataset in zip(panels, DATASETS, strict=True):
        for name, events in runs.items():
            panel.plot(*curve(events, dataset), "o-", markersize=3, label=name)
        panel.set(title=f"held-out problems, {dataset}", xlabel="rollouts finished", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.25)
    panels[1].legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=ROOT / "outputs/demo-seed1", help="what make demo has made")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--rollouts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start: Path = args.start.resolve()
    if not (start / "sft/hf").is_dir():
        sys.exit(f"--start {start}: no supervised start there; run `make demo` first")
    facts = machine()
    columns = ["estimator", "flags", *(f"{name}, before → after" for name in DATASETS), "seconds a step"]
    table = Table(f"Mean reward on held-out problems after {args.rollouts} rollouts of 32 prompts x 8", columns)
    runs: dict[str, list[dict[str, float]]] = {}
    goals: list[Goal] = []
    for name in args.only:
        out = OUTPUTS / "estimators" / name.replace(" ", "")
        runs[name] = events = run(name, start, out, rollouts=args.rollouts, seed=args.seed)
        curves = {dataset: curve(events, dataset)[1] for dataset in DATASETS}
        seconds = [event["time/step"] - event["time/evaluation"] for event in events if "time/step" in event]
        flags = " ".join(word for word in RUNS[name])
        reached = [f"{values[0]:.3f} → {values[-1]:.3f}" for values in curves.values()]
        table.rows.append([name, f"`{flags}`", *reached, f"{sum(seconds) / len(seconds):.2f}"])
        goals.append(Goal(f"{name}: greedy", curves["greedy"][-1], GOAL))
        print(" | ".join(table.rows[-1]), flush=True)
    draw(runs, CURVES)
    raw = {name: {dataset: curve(events, dataset) for dataset in DATASETS} for name, events in runs.items()}
    write_result(OUTPUTS / "estimators.json", [table], goals, facts, raw)


if __name__ == "__main__":
    main()
