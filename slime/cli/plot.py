"""Draw a run's metrics.jsonl as a PNG, and print its evaluations and its wall time by phase.

slime plot outputs/demo-seed1/rl/metrics.jsonl --out curves.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slime.observability.metrics_log import read_metrics

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8f5aa5", "#b8860b", "#4d4d4d")
Events = Sequence[dict[str, float]]
Series = tuple[list[float], list[float]]


def series(events: Events, key: str) -> Series:
    """Return (steps, values) of the events that have `key`."""
    found = [(event["step"], event[key]) for event in events if key in event]
    return [step for step, _ in found], [value for _, value in found]


def dataset_names(events: Events) -> list[str]:
    """Return the evaluated datasets, in order of appearance."""
    keys = [key for event in events for key in event if key.startswith("eval/") and key.endswith("/reward")]
    return list(dict.fromkeys(key.split("/")[1] for key in keys))


def phase_names(events: Events) -> list[str]:
    """Return the phases that sum to `time/step`: the other times of the events that have it."""
    keys = [key for event in events if "time/step" in event for key in event if key.startswith("time/")]
    return [key.removeprefix("time/") for key in dict.fromkeys(keys) if key != "time/step"]


def draw(events: Events, title: str) -> Any:
    """Draw a figure with four panels: reward, evaluation, response length, wall time of a step by phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.25, "legend.frameon": False, "axes.titleweight": "bold"})
    figure, ((reward, evaluation), (length, seconds)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)

    steps, values = series(events, "rollout/reward")
    reward.plot(steps, values, color=COLOURS[0], alpha=0.35, linewidth=1)
    reward.plot(steps, running_mean(values, 5), color=COLOURS[0], label="mean of 5 rollouts")
    reward.set(title="Training reward", xlabel="rollout", ylim=(-0.02, 1.02))
    reward.legend(loc="lower right")

    for colour, name in zip(COLOURS * 9, dataset_names(events), strict=False):
        steps, values = series(events, f"eval/{name}/reward")
        evaluation.plot(steps, values, "o-", color=colour, markersize=4, label=name)
        error_steps, errors = series(events, f"eval/{name}/reward_stderr")
        if error_steps == steps:
            low = [value - error for value, error in zip(values, errors, strict=True)]
            high = [value + error for value, error in zip(values, errors, strict=True)]
            evaluation.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        steps, values = series(events, f"eval/{name}/response_length")
        length.plot(steps, values, "o--", color=colour, markersize=3, alpha=0.8, label=f"eval {name}")
    evaluation.set(title="Held-out reward (± standard error)", xlabel="rollouts finished", ylim=(-0.02, 1.02))
    evaluation.legend(loc="lower right")

    length.plot(*series(events, "rollout/response_length"), color=COLOURS[5], label="training")
    length.set(title="Response length, tokens", xlabel="rollout")
    length.legend(loc="lower right")

    timed = [event for event in events if "time/step" in event]
    names = phase_names(events)
    stack = [[event.get(f"time/{name}", 0.0) for event in timed] for name in names]
    seconds.stackplot([event["step"] for event in timed], stack, labels=names, alpha=0.8, step="mid")
    seconds.set(title="Wall time of a step, seconds", xlabel="rollout")
    seconds.legend(loc="upper right", ncols=2, fontsize=8)
    return figure


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width` - 1 values before it."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def evaluations(events: Events) -> Table:
    """Return a table with one row for each evaluated dataset and step."""
    keys = ("reward", "format", "truncated", "response_length")
    table = Table("rollouts", "dataset", *(key.replace("_", " ") for key in keys), title="Held-out problems")
    for name in dataset_names(events):
        for event in events:
            if f"eval/{name}/reward" not in event:
                continue
            values = {key: event.get(f"eval/{name}/{key}") for key in (*keys, "reward_stderr")}
            cells = ["" if values[key] is None else f"{values[key]:.3f}" for key in keys]
            if values["reward_stderr"] is not None:
                cells[0] += f" ± {values['reward_stderr']:.3f}"
            table.add_row(str(event["step"]), name, *cells)
        table.add_section()
    return table


def phases(events: Events) -> Table:
    """Return a table of the mean seconds of a step by phase, with their sum and the step's wall time."""
    timed = [event for event in events if "time/step" in event]
    table = Table("phase", "seconds a step", "share", title=f"Wall time, mean of {len(timed)} steps")
    if not timed:
        return table
    wall = sum(event["time/step"] for event in timed) / len(timed)
    total = 0.0
    for name in phase_names(events):
        mean = sum(event.get(f"time/{name}", 0.0) for event in timed) / len(timed)
        total += mean
        table.add_row(name.replace("_", " "), f"{mean:.3f}", f"{mean / wall:.1%}")
    table.add_section()
    table.add_row("sum of phases", f"{total:.3f}", f"{total / wall:.1%}")
    table.add_row("wall time", f"{wall:.3f}", "100.0%")
    return table


def main(argv: Sequence[str]) -> None:
    """Draw the metrics that the flags name, and print the tables.

    Raises:
        OSError, ValueError: the metrics cannot be read, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="slime plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    parser.add_argument("--out", type=Path, help="the PNG to write; default: curves.png next to the metrics")
    parser.add_argument("--title", help="default: the run's directory")
    args = parser.parse_args(argv)
    events = read_metrics(args.metrics)
    out: Path = args.out or args.metrics.with_name("curves.png")
    draw(events, args.title or str(args.metrics.parent)).savefig(out, dpi=150)
    console = Console(highlight=False)
    console.print(evaluations(events))
    console.print(phases(events))
    console.print(f"curves: {out}")
