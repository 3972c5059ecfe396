"""Draw the metrics.jsonl of runs as a PNG, and print a run's evaluations and its wall time by phase.

    slime plot outputs/demo-seed1/rl
    slime plot outputs/first outputs/second --out both.png

Only panels with data are drawn. Values that are not finite leave a gap, and the panel's title counts them.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slime.observability.metrics_log import read_metrics

COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8f5aa5", "#b8860b", "#4d4d4d", "#e07a5f", "#2a9d8f")
STYLES = ("-", "--", ":", "-.")
FEW_POINTS = 40
"""Up to so many points of a curve are marked, so that one alone is seen."""
MANY_CURVES = 12
"""A panel with more curves has no legend."""
Events = Sequence[dict[str, float]]
Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Panel:
    """A panel: every metric whose whole name matches one of the patterns is a curve."""

    title: str
    patterns: tuple[str, ...]
    log: bool = False
    """A logarithmic axis, for values that differ by orders of magnitude."""
    only_if_not_zero: bool = False
    """Leave the panel out where all is 0: the run has nothing of this kind."""
    smooth: bool = False
    """Draw the mean of 5 values over the values."""


PANELS = (
    Panel("Training reward", ("rollout/reward",), smooth=True),
    Panel("Held-out reward (± standard error)", (r"eval/[^/]+/reward",)),
    Panel("Entries of the reward", (r"rollout/reward/.+", r"eval/[^/]+/reward/.+")),
    Panel("Loss", ("train/loss", r"eval/[^/]+/loss", "critic/loss")),
    Panel("Response length, tokens", ("rollout/response_length", r"eval/[^/]+/response_length")),
    Panel("Share of truncated responses", ("rollout/truncated", r"eval/[^/]+/truncated"), only_if_not_zero=True),
    Panel("Groups without a signal", ("rollout/zero_std_groups", "rollout/groups_dropped/.+"), only_if_not_zero=True),
    Panel("Samples without a reward", ("rollout/reward_failed/.+",), only_if_not_zero=True),
    Panel("|trainer − engine log-prob|", ("train/logprob_gap_mean", "train/logprob_gap_max"), log=True),
    Panel("Gradient norm", ("train/grad_norm", "critic/grad_norm")),
    Panel("Entropy, nats a token", ("train/entropy",)),
    Panel("KL", ("train/kl_loss", "train/ppo_kl", "train/teacher_kl"), only_if_not_zero=True),
    Panel("Share of clipped tokens", ("train/(dual_)?clip_fraction", "train/tis_clipped"), only_if_not_zero=True),
    Panel("Staleness, policy versions", ("train/staleness(_max)?", "rollout/staleness(_max)?"), only_if_not_zero=True),
    Panel("Learning rate", ("train/lr",)),
    Panel("Tokens a second", ("rollout/tokens_per_second", "train/tokens_per_second")),
)
TIMES = "Wall time of a step, seconds"


def series(events: Events, key: str) -> Series:
    """Return (steps, values) of the events that have `key`, by step; values that are not finite are NaN."""
    found = sorted(((event["step"], event[key]) for event in events if key in event), key=lambda point: point[0])
    return [step for step, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def keys_of(events: Events) -> list[str]:
    """Return the names of all numbers, in order of appearance."""
    found = [key for event in events for key, value in event.items() if key != "step" and is_number(value)]
    return list(dict.fromkeys(found))


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


def dataset_names(events: Events) -> list[str]:
    """Return the evaluated datasets, in order of appearance."""
    keys = [key for key in keys_of(events) if re.fullmatch(r"eval/[^/]+/(reward|loss)", key)]
    return list(dict.fromkeys(key.split("/")[1] for key in keys))


def phase_names(events: Events) -> list[str]:
    """Return the phases that sum to `time/step`: the other times of the events that have it."""
    keys = [key for event in events if "time/step" in event for key in event if key.startswith("time/")]
    return [key.removeprefix("time/") for key in dict.fromkeys(keys) if key != "time/step"]


@dataclass(frozen=True)
class Curve:
    """One metric of one run in a panel."""

    key: str
    label: str
    points: Series
    errors: Series
    run: int


def curves_of(panel: Panel, runs: Mapping[str, Events]) -> list[Curve]:
    """Return the panel's curves; none if there is nothing to see."""
    found: list[Curve] = []
    for number, (name, events) in enumerate(runs.items()):
        keys = [key for key in keys_of(events) if any(re.fullmatch(pattern, key) for pattern in panel.patterns)]
        for key in keys:
            label = label_of(key, keys) if len(runs) == 1 else f"{name}: {label_of(key, keys)}"
            found.append(Curve(key, label, series(events, key), series(events, f"{key}_stderr"), number))
    values = [value for curve in found for value in curve.points[1]]
    return [] if not values or (panel.only_if_not_zero and not any(values)) else found


def label_of(key: str, keys: Sequence[str]) -> str:
    """Return a name for a legend: `rollout/reward` becomes `reward`, if no other of `keys` has the same last part."""
    group, _, rest = key.partition("/")
    alone = group != "eval" and sum(other.partition("/")[2] == rest for other in keys) == 1
    return (rest if alone else key).replace("/", " ").replace("_", " ")


def draw(runs: Mapping[str, Events], title: str) -> Any:
    """Draw a figure with a panel for everything that the runs have.

    Raises:
        ValueError: they have nothing that a panel shows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update(
        {"grid.alpha": 0.25, "legend.framealpha": 0.7, "legend.edgecolor": "none", "axes.titleweight": "bold"}
    )
    drawn = [(panel, curves) for panel in PANELS if (curves := curves_of(panel, runs))]
    timed = any("time/step" in event for events in runs.values() for event in events)
    count = len(drawn) + timed
    if not count:
        raise ValueError(f"{', '.join(runs)}: no event has a metric that is drawn (docs/metrics.md has their names)")
    columns = min(count, 2 if count <= 4 else 3 if count <= 9 else 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 2.7 * rows + 0.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title, wrap=True)
    places = list(axes.flat)
    for (panel, curves), place in zip(drawn, places, strict=False):
        draw_panel(place, panel, curves, several=len(runs) > 1)
    if timed:
        draw_times(places[len(drawn)], runs)
    for place in places[count:]:
        place.remove()
    return figure


def draw_panel(place: Any, panel: Panel, curves: Sequence[Curve], *, several: bool) -> None:
    """Draw the curves of a panel. With several runs, a colour is a run and a style a metric."""
    keys = list(dict.fromkeys(curve.key for curve in curves))
    for number, curve in enumerate(curves):
        steps, values = curve.points
        colour = COLOURS[(curve.run if several else number) % len(COLOURS)]
        style = STYLES[keys.index(curve.key) % len(STYLES)] if several else "-"
        mark = "o" if len(values) <= FEW_POINTS else None
        smooth = panel.smooth and len(values) > 5
        look = {"color": colour, "linestyle": style, "markersize": 3}
        place.plot(
            steps, values, marker=mark, alpha=0.3 if smooth else 1, label=None if smooth else curve.label, **look
        )
        if smooth:
            place.plot(steps, running_mean(values, 5), label=f"{curve.label}, mean of 5", **look)
        if curve.errors[0] == steps:
            low = [value - error for value, error in zip(values, curve.errors[1], strict=True)]
            high = [value + error for value, error in zip(values, curve.errors[1], strict=True)]
            place.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    values = [value for curve in curves for value in curve.points[1]]
    if panel.log and any(value > 0 for value in values):
        place.set_yscale("log", nonpositive="mask")
    bad = sum(map(math.isnan, values))
    place.set_title(f"{panel.title} ({bad} not finite)" if bad else panel.title, color="#d1495b" if bad else "black")
    number_rollouts(place, [step for curve in curves for step in curve.points[0]])
    if len(curves) <= MANY_CURVES:
        place.legend(loc="best", fontsize=7)


def number_rollouts(place: Any, steps: Sequence[float]) -> None:
    """Label the axis of rollouts with whole numbers, also if there is only one."""
    place.set_xlabel("rollouts finished")
    if min(steps) == max(steps):
        place.set_xlim(steps[0] - 1, steps[0] + 1)
        place.set_xticks([steps[0]])
    else:
        place.xaxis.get_major_locator().set_params(integer=True)


def draw_times(place: Any, runs: Mapping[str, Events]) -> None:
    """Draw the phases of one run on top of each other; of several runs, only the time of a step."""
    place.set_title(TIMES)
    by_run = {name: [event for event in events if "time/step" in event] for name, events in runs.items()}
    number_rollouts(place, [event["step"] for timed in by_run.values() for event in timed])
    colours = COLOURS * 9
    if len(runs) > 1:
        for colour, (name, timed) in zip(colours, by_run.items(), strict=False):
            if timed:
                place.plot(*series(timed, "time/step"), color=colour, label=name)
    else:
        [timed] = by_run.values()
        if len(timed) == 1:  # an area needs two points
            timed = [{**timed[0], "step": timed[0]["step"] + shift} for shift in (-0.4, 0.4)]
        names = phase_names(timed)
        heights = [[event.get(f"time/{name}", 0.0) for event in timed] for name in names]
        labels = [name.replace("_", " ") for name in names]
        steps = [event["step"] for event in timed]
        place.stackplot(steps, heights, labels=labels, colors=colours[: len(names)], alpha=0.85, step="mid")
    place.set_ylim(bottom=0)
    place.legend(loc="best", ncols=2, fontsize=7)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width` - 1 values before it; NaN counts nowhere."""
    means: list[float] = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if not math.isnan(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def evaluations(events: Events) -> Table:
    """Return a table with one row for each evaluated dataset and step, and a column for each number that there is."""
    names = dataset_names(events)
    keys = [
        key
        for key in ("reward", "loss", "format", "truncated", "response_length")
        if any(f"eval/{name}/{key}" in event for event in events for name in names)
    ]
    table = Table("rollouts", "dataset", *(key.replace("_", " ") for key in keys), title="Held-out problems")
    for name in names:
        for event in events:
            values = {key: event.get(f"eval/{name}/{key}") for key in keys}
            if values.get("reward") is None and values.get("loss") is None:
                continue
            errors = {key: event.get(f"eval/{name}/{key}_stderr") for key in keys}
            cells = [
                ("" if values[key] is None else f"{values[key]:.3f}")
                + ("" if errors[key] is None else f" ± {errors[key]:.3f}")
                for key in keys
            ]
            table.add_row(str(event["step"]), name, *cells)
        table.add_section()
    return table


def phases(events: Events) -> Table:
    """Return a table of the mean seconds of a step by phase, with their sum and the step's wall time."""
    timed = [event for event in events if "time/step" in event]
    table = Table("phase", "seconds a step", "share", title=f"Wall time, mean of {len(timed)} steps")
    wall = sum(event["time/step"] for event in timed) / max(1, len(timed))
    if not wall:
        return table
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
        OSError, ValueError: the metrics cannot be read or have nothing to draw, or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="slime plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "metrics", type=Path, nargs="+", help="a run's directory, or its metrics.jsonl; several: in one"
    )
    parser.add_argument("--out", type=Path, help="the PNG to write; default: curves.png next to the first metrics")
    parser.add_argument("--title", help="default: the run's directory")
    args = parser.parse_args(argv)
    paths: list[Path] = [path / "metrics.jsonl" if path.is_dir() else path for path in args.metrics]
    runs = dict(zip(run_names(paths), map(read_metrics, paths), strict=True))
    out: Path = args.out or paths[0].with_name("curves.png")
    title = args.title or (str(paths[0].parent) if len(paths) == 1 else ", ".join(runs))
    draw(runs, title).savefig(out, dpi=150)
    console = Console(highlight=False)
    for name, events in runs.items():
        if len(runs) > 1:
            console.print(f"\n{name}")
        for table in (evaluations(events), phases(events)):
            if table.row_count:
                console.print(table)
    console.print(f"curves: {out}")


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each run: its directory's, with the parents' where these are equal."""
    parents = [path.absolute().parent for path in paths]
    for depth in range(1, max(len(parent.parts) for parent in parents) + 1):
        names = [str(Path(*parent.parts[-depth:])) for parent in parents]
        if len(set(names)) == len(names):
            return names
    return [str(path) if paths.count(path) == 1 else f"{path} ({number})" for number, path in enumerate(paths, 1)]
