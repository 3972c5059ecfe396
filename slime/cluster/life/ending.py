"""The closing lines of a run: what it made, where that is, how long it took, and the commands that come next.

- Called by: the cluster, when the loop has ended without an error.
- Invariant: every path and command is real, and can be pasted as it is. If trained weights are lost, a line says so.
"""

from __future__ import annotations

import itertools
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime.config.args import Args
from slime.config.eval_data import eval_datasets
from slime.observability.console.lines import count, results_of, shares_of
from slime.observability.console.text import duration, number
from slime.observability.metrics_log import read_metrics
from slime.observability.run_directory import METRICS

MOST_SETS = 3
"""Evaluated data sets that get a line."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a run; `times` are its seconds by phase (`time/...`), and `seconds` all of its wall time."""

    first: int
    done: int
    total: int
    seconds: float
    times: Mapping[str, float]
    saved: str | None
    """The last checkpoint that it wrote."""
    loaded: str | None
    """Where the weights came from; None without trainers."""


def closing_lines(args: Args, outcome: Outcome) -> list[str]:
    """Return about five lines for the end of the run."""
    metrics = Path(args.resolved.log_dir) / METRICS
    events = _events(metrics)
    lines = [_head(args, outcome), *_model(args, outcome), *_evaluations(events, outcome)]
    if not any(key.startswith("eval/") for event in events for key in event):
        lines += _curve(args, events)
    return [*lines, *[f"next: {command}" for command in _commands(args, outcome, metrics)]]


def _events(metrics: Path) -> list[dict[str, float]]:
    try:
        return read_metrics(metrics)
    except (OSError, ValueError) as error:  # the run has succeeded, and this file is only read to say so
        logger.warning("the closing lines lack the metrics: %s", error)
        return []


def _head(args: Args, outcome: Outcome) -> str:
    in_loop = sum(outcome.times.values())
    shares = [f"start and end {max(0.0, outcome.seconds - in_loop) / outcome.seconds:.0%}"]
    shares += [
        f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares_of(outcome.times, outcome.seconds).items()
    ]
    took = f"in {duration(outcome.seconds)}: {', '.join(shares)}"
    if outcome.total == 0:
        return f"done: evaluated {took}"
    done = f"{outcome.done}/{count(outcome.total, 'rollout')}"
    new = outcome.done - outcome.first
    here = f" ({new} of them now)" if outcome.first else ""
    what = "generated, nothing was trained (--debug-rollout-only)," if args.debug_rollout_only else ""
    verb = "done" if outcome.done == outcome.total else "stopped after"
    return " ".join(part for part in (f"{verb}: {done}{here}", what, took) if part).replace("after: ", "after ")


def _model(args: Args, outcome: Outcome) -> list[str]:
    """Return where the trained weights are; nothing if nothing was trained."""
    if outcome.loaded is None or outcome.total == 0:
        return [] if outcome.loaded is None else [f"model: {outcome.loaded}"]
    if outcome.done == outcome.first:
        return [f"model: {outcome.loaded} (nothing was trained now)"]
    if outcome.saved is None:
        return ["WARNING nothing was saved: the trained weights are lost; --save-interval 0 saves no checkpoint"]
    exported = _exported(args, outcome)
    return [f"model: {outcome.saved}" + (f"  Hugging Face: {exported}" if exported else "")]


def _exported(args: Args, outcome: Outcome) -> str | None:
    if args.save_hf is None or outcome.saved is None:
        return None
    return args.save_hf.format(rollout_id=outcome.done - 1)


def _evaluations(events: Sequence[Mapping[str, float]], outcome: Outcome) -> list[str]:
    """Return a line for each evaluated data set: its first, best and last reward, or loss."""
    curves: dict[str, dict[int, float]] = {}
    for event in events:
        for name, value in results_of(event).items():
            curves.setdefault(name, {})[int(event["step"])] = value
    lines: list[str] = []
    for name, curve in sorted(curves.items()):
        steps = sorted(curve)
        sign = -1 if name.endswith(" loss") else 1
        finite = [step for step in steps if math.isfinite(curve[step])]
        best = max(finite, key=lambda step: sign * curve[step], default=None)
        values = [number(curve[step], ".3f") for step in dict.fromkeys((steps[0], steps[-1]))]
        line = f"eval {name}: {' -> '.join(values)} after {count(steps[-1], 'rollout')}"
        if best is not None and sign * curve[best] > sign * curve[steps[-1]]:
            line += f", best {number(curve[best], '.3f')} after {count(best, 'rollout')}"
        elif best is not None and sign * curve[best] > sign * curve[steps[0]]:
            line += ", the best"
        lines.append(line)
    more = len(lines) - MOST_SETS
    return lines if more <= 1 else [*lines[:MOST_SETS], f"and {more} more data sets, in {METRICS}"]


def _curve(args: Args, events: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the first and last reward of a run without evaluations, or loss under supervised training."""
    key, name = ("train/loss", "loss") if args.loss_type == "sft_loss" else ("rollout/reward", "reward of the samples")
    values = [(int(event["step"]) - 1, event[key]) for event in events if key in event]
    if not values:
        return []
    return [
        f"{name}: "
        + " -> ".join(f"{number(value, '.3f')} in rollout {at}" for at, value in dict.fromkeys((values[0], values[-1])))
    ]


def _commands(args: Args, outcome: Outcome, metrics: Path) -> list[str]:
    """Return the next commands, at most two."""
    commands = [["slime", "plot", str(metrics)]] if outcome.done else []
    exported, saved = _exported(args, outcome), outcome.saved
    if exported is not None:
        commands += _answers(args, exported)
    elif saved is not None and args.hf_checkpoint is not None:
        words = ["slime", "export", "--input-dir", saved, "--origin-hf-dir", args.hf_checkpoint]
        commands.append([*words, "--output-dir", str(_new_directory(Path(saved).parent))])
    return [shlex.join(words) for words in commands]


def _new_directory(root: Path) -> Path:
    """Return a directory in `root` that does not exist, because an export replaces what is there."""
    names = ("hf" if number == 1 else f"hf-{number}" for number in itertools.count(1))
    return next(path for path in map(root.joinpath, names) if not path.exists())


def _answers(args: Args, exported: str) -> list[list[str]]:
    """Return the command that compares answers before and after, if the data has the layout that it reads."""
    sets = eval_datasets(args)
    keys = sets[0].keys if sets else None
    if keys is None or args.hf_checkpoint is None or not isinstance(sets[0].path, str):
        return []
    path = sets[0].path.partition("@[")[0]
    if not path.endswith(".jsonl") or (keys.input_key, keys.label_key) != ("prompt", "label"):
        return []
    return [["slime", "answers", "--before", args.hf_checkpoint, "--after", exported, "--prompt-data", path]]
