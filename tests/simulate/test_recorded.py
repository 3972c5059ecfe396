"""A real run as input: speeds that are found again, and one clear error for each wrong file."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from slime.cli.train import train
from slime.cli.train_async import train as train_async
from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.problem import UsageError
from slime.core.sample import Sample, Status
from slime.core.verbs import Story
from slime.rollout.dump import write_dump
from slime.simulate.lengths import LogNormal
from slime.simulate.loop import run_story
from slime.simulate.recorded import groups_of_file, lengths_of, measured, read_run
from slime.simulate.speeds import CPU_SHAPE, Speeds
from tests.simulate.plans_for_tests import plan_args

STORIES: dict[int, Story] = {0: train, 1: train_async}
LENGTHS = LogNormal(20.0, 60.0, 64, prompt_length=8)
TRUE = Speeds(CPU_SHAPE.scaled(0.01), 3e9, 256, sync=0.5, overhead=0.125)


def record(directory: Path, args: Args, *, rollouts: int = 10) -> None:
    """Write the files that a run with these speeds would write."""
    directory.mkdir()
    (directory / "args.yaml").write_text(dump_args(replace(args, num_rollout=rollouts)))
    steps = run_story(STORIES[args.rollouts_ahead], args, TRUE, LENGTHS, num_rollouts=rollouts)
    events: list[dict[str, float]] = []
    rows: list[dict[str, object]] = []
    for number, step in enumerate(steps, 1):
        metrics = {"time/rollout": step.metrics["time/rollout"]}
        if args.rollouts_ahead:
            metrics["time/rollout_waited"] = step.times["time/generation"]
        events += [{"step": number, **metrics}, {"step": number, **step.times}]
        for sample, length in zip(step.samples, step.lengths, strict=True):
            group = sample // args.resolved.n_samples_per_prompt
            rows.append(
                {"step": number, "split": "train", "group": group, "prompt_tokens": 8, "response_tokens": length - 8}
            )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_recorded_run_gives_its_speeds_again(ahead: int, tmp_path: Path) -> None:
    """The speeds and the step time of the second half of a run, predicted from its first half."""
    args = plan_args(rollout_batch_size=16, rollouts_ahead=ahead, num_steps_per_rollout=1, num_rollout=10)
    record(tmp_path / "run", args)
    plan = replace(args, simulate_run=str(tmp_path / "run"), simulate_run_rollouts=5)
    run = read_run(plan)
    assert run is not None
    assert (run.args.rollouts_ahead, run.args.rollout_batch_size, run.rollouts) == (ahead, 16, 4)
    lengths, _ = lengths_of(plan, run)
    speeds = measured(run, STORIES, lengths)
    assert speeds.engine.step == pytest.approx(TRUE.engine.step, rel=0.15)
    assert speeds.train_flops == pytest.approx(TRUE.train_flops, rel=0.15)
    assert (speeds.sync, speeds.overhead) == pytest.approx((0.5, 0.125))
    real = run_story(STORIES[ahead], args, TRUE, LENGTHS, num_rollouts=10)[5:9]
    ours = run_story(STORIES[ahead], args, speeds, lengths, num_rollouts=10)[1:9]
    mean = [statistics.fmean(step.times["time/step"] for step in steps) for steps in (real, ours)]
    assert mean[1] == pytest.approx(mean[0], rel=0.15)
    slow = run_story(STORIES[ahead], args, replace(speeds, sync=5.0), lengths, num_rollouts=10)[1:9]  # control
    assert statistics.fmean(step.times["time/step"] for step in slow) > 1.15 * mean[0]


def refused(args: Args) -> str:
    with pytest.raises(UsageError) as caught:
        lengths_of(args, read_run(args))
    assert len(caught.value.problems) == 1
    return str(caught.value.problems[0])


def test_each_wrong_input_is_one_clear_error(tmp_path: Path) -> None:
    args = plan_args()
    assert "--simulate-lengths (not given): nothing is known" in refused(args)
    assert "--simulate-lengths 100 50: no log-normal" in refused(replace(args, simulate_lengths=(100.0, 50.0)))
    assert f"--simulate-samples {tmp_path}: no such file" in refused(replace(args, simulate_samples=str(tmp_path)))
    text = tmp_path / "text.jsonl"
    text.write_text("words\n")
    assert f"--simulate-samples {text}: not a samples.jsonl ({text}:1:" in refused(
        replace(args, simulate_samples=str(text))
    )
    run = replace(args, simulate_run=str(tmp_path))
    assert f"--simulate-run {tmp_path}: there is no args.yaml" in refused(run)
    (tmp_path / "args.yaml").write_text(dump_args(args))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/x/reward": 1}\n')
    assert f"--simulate-run {tmp_path}: metrics.jsonl has no trained rollout" in refused(run)
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    assert "metrics.jsonl:1: not an event" in refused(run)


def test_a_dump_gives_lengths_by_group(tmp_path: Path) -> None:
    groups = [
        [
            Sample(group, index, tokens=[1] * (2 + length), prompt_length=2, response_length=length)
            for index, length in enumerate(lengths)
        ]
        for group, lengths in enumerate([(3, 4), (5, 6)])
    ]
    for group in groups:
        for sample in group:
            sample.status = Status.COMPLETED
    write_dump(tmp_path / "dump.jsonl", groups)
    found = groups_of_file(tmp_path / "dump.jsonl")
    assert [(group.prompt, group.responses) for group in found] == [(2, (3, 4)), (2, (5, 6))]
