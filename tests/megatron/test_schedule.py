"""Learning rate and weight decay at every optimizer step, and across a resume, against formulas of one line each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from made_up import Run, drawn, make_args
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args

pytestmark = pytest.mark.dist

STEPS = 12
"""6 rollouts of 2 steps."""
RESUMED_AT = 5
LR = 1e-2

SCHEDULES: list[dict[str, Any]] = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "constant", "lr_warmup_iters": 4, "lr_warmup_init": 1e-3},
    {"lr_decay_style": "constant", "lr_warmup_fraction": 0.3},
    {"lr_decay_style": "linear", "min_lr": 1e-3},
    {"lr_decay_style": "linear", "lr_decay_iters": 7, "lr_warmup_iters": 3},
    {"lr_decay_style": "cosine", "min_lr": 2e-3, "lr_warmup_fraction": 0.2},
    {"lr_decay_style": "cosine", "lr_decay_iters": 9},
    {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 3, "min_lr": 6e-3},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "linear", "lr_warmup_iters": 2},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "cosine", "min_lr": 1e-3},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "exponential"},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_wsd_decay_style": "minus_sqrt", "lr_decay_iters": 10},
    {"weight_decay_incr_style": "linear", "start_weight_decay": 0.02, "end_weight_decay": 0.3},
    {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.0, "end_weight_decay": 0.1, "lr_decay_iters": 4},
]


def args_of(save: Path | None, flags: dict[str, Any]) -> Args:
    base = {"lr": LR, "lr_decay_style": "constant", "lr_decay_iters": None, "num_rollout": 6, "weight_decay": 0.05}
    return make_args(save, **{**base, "num_steps_per_rollout": 2, **flags})


def planned_rate(step: int, flags: dict[str, Any]) -> float:
    """Return the learning rate of the step that comes after `step` others."""
    low, end = flags.get("min_lr", 0.0), flags.get("lr_decay_iters", STEPS)
    warm_up = flags.get("lr_warmup_fraction", 0.0) * end or flags.get("lr_warmup_iters", 0)
    first = flags.get("lr_warmup_init", 0.0)
    if warm_up and step <= warm_up:
        return first + (LR - first) * step / warm_up
    style = flags.get("lr_decay_style", "constant")
    if style == "constant":
        return LR
    if step > end:
        return low
    if style == "inverse-square-root":
        return max(low, LR * math.sqrt(max(warm_up, 1) / max(step, 1)))
    done = (step - warm_up) / (end - warm_up)
    if style == "WSD":
        style, length = flags["lr_wsd_decay_style"], flags["lr_wsd_decay_iters"]
        done = max(0.0, 1 - (end - step) / length)
    left = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "exponential": 2 * 0.5**done - 1,
        "minus_sqrt": 1 - done**0.5,
    }[style]
    return low + (LR - low) * left


def planned_decay(step: int, flags: dict[str, Any]) -> float:
    style = flags.get("weight_decay_incr_style", "constant")
    if style == "constant":
        return 0.05
    done = step / STEPS
    grown = done if style == "linear" else (1 - math.cos(math.pi * done)) / 2
    return flags["start_weight_decay"] + grown * (flags["end_weight_decay"] - flags["start_weight_decay"])


def followed(rank: int, world_size: int, init_method: str, schedules: list[Args]) -> list[list[tuple[set[float], ...]]]:
    """Return, for each schedule and step, the learning rates and weight decays of the optimizer's groups."""
    found: list[list[tuple[set[float], ...]]] = []
    with joined(schedules[0], rank, world_size, init_method) as topology:
        for args in schedules:
            run = Run(args, topology)
            values: list[tuple[set[float], ...]] = []
            for step in range(STEPS + 3):
                if step == RESUMED_AT:
                    saved, run = run.scheduler.state_dict(), Run(args, topology)
                    run.scheduler.load_state_dict(saved)
                groups = run.optimizer.param_groups
                values.append(({group["lr"] for group in groups}, {group["weight_decay"] for group in groups}))
                run.scheduler.step(1)
            found.append(values)
    return found


def test_every_step_of_every_schedule(workers: WorkerPool) -> None:
    [found] = workers.run(1, followed, [args_of(None, flags) for flags in SCHEDULES])
    for flags, values in zip(SCHEDULES, found, strict=True):
        for step, (rates, decays) in enumerate(values):
            [rate] = rates
            assert rate == pytest.approx(planned_rate(step, flags), rel=1e-12, abs=1e-18), (flags, step)
            assert 0.0 in decays  # biases and norms
            expected = planned_decay(min(step, STEPS), flags)
            assert max(decays) == pytest.approx(expected, rel=1e-12, abs=1e-18), (flags, step)
    # control: one step later every schedule but the constant one has other values
    later = [[planned_rate(step + 1, flags) for step in range(STEPS)] for flags in SCHEDULES[1:12]]
    assert all(
        [next(iter(rates)) for rates, _ in values[:STEPS]] != pytest.approx(plan, rel=1e-9)
        for values, plan in zip(found[1:12], later, strict=True)
    )


def stepped(rank: int, world_size: int, init_method: str, args: Args, resumed: Args) -> list[dict[str, Tensor]]:
    """Return the weights before the first step and after each; a new run loads a checkpoint at RESUMED_AT."""
    from slime.megatron.optim.optimizer import follow_schedule

    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        found = [{name: parameter.detach().clone() for name, parameter in run.parameters.items()}]
        for step in range(STEPS):
            if step == RESUMED_AT:
                path, run = run.save(step), Run(resumed, topology)
                run.load(path)
                follow_schedule(run.optimizer, run.scheduler)
            run.step(step)
            found.append({name: parameter.detach().clone() for name, parameter in run.parameters.items()})
        return found


MOVING: dict[str, Any] = {
    "optimizer": "sgd",
    "sgd_momentum": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 3,
    "min_lr": 1e-3,
    "weight_decay_incr_style": "linear",
    "start_weight_decay": 0.1,
    "end_weight_decay": 0.9,
}


@pytest.mark.parametrize("kept", [False, True])
def test_steps_are_taken_at_the_planned_rates(workers: WorkerPool, tmp_path: Path, kept: bool) -> None:
    """With `kept`, the resumed run's flags differ, and it keeps the checkpoint's schedule."""
    other = {"lr_decay_style": "linear", "min_lr": 0.0, "end_weight_decay": 0.2} if kept else {}
    resumed = args_of(None, {**MOVING, **other, "use_checkpoint_opt_param_scheduler": kept})
    [found] = workers.run(1, stepped, args_of(tmp_path, MOVING), resumed)
    weights = {name: weight.double() for name, weight in found[0].items()}
    for step, after in enumerate(found[1:]):
        rate, decay = planned_rate(step, MOVING), planned_decay(step, MOVING)
        for name, weight in weights.items():
            gradient = drawn(name, step, tuple(weight.shape)).double()
            if "embedding" in name or "output_layer" in name:
                continue  # their padding has no gradient
            kept_back = decay * weight if weight.dim() > 1 else 0.0
            weights[name] = weight - rate * (gradient + kept_back)
            assert (after[name] - weights[name]).abs().max() < 3e-6, (name, step)
