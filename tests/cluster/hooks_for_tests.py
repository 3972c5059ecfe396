"""Hooks of the rollout manager that tests name by dotted path."""

from __future__ import annotations

import asyncio
import os
import subprocess
import zlib
from pathlib import Path

from slime.config.args import Args
from slime.core.batch import TrainBatch, from_samples
from slime.core.sample import Sample, Status
from slime.engine.membership import register_worker
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.evaluate import Evaluator


def log_rollout(args: Args, rollout_id: int, samples: list[Sample], metrics: dict[str, float]) -> None:
    assert args.save is not None
    Path(args.save, "logged").write_text(f"{rollout_id} {len(samples)} {metrics['rollout/reward']}")


def first_two(args: Args, samples: list[Sample]) -> TrainBatch:
    return from_samples(samples[:2])


def roll_plainly(args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext) -> RolloutResult:
    assert isinstance(args, Args)
    assert isinstance(context, RolloutContext)
    groups = data_source.get_groups(3, rollout_id=rollout_id)
    for [sample] in groups:
        sample.tokens = [*sample.tokens, 5]
        sample.response_length, sample.reward, sample.status = 1, float(rollout_id), Status.COMPLETED
    return RolloutResult(groups, {"rollout/own": len(groups)})


async def roll(args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext) -> RolloutResult:
    return roll_plainly(args, rollout_id, data_source, context)


async def evaluate(args: Args, rollout_id: int, context: RolloutContext) -> dict[str, float]:
    return {"eval/own/reward": rollout_id + context.policy_version / 10}


async def let_a_stranger_in(args: Args, rollout_id: int, context: RolloutContext) -> dict[str, float]:
    """Register an engine at the router while the evaluation runs."""
    if os.environ["STRANGER"]:
        await asyncio.to_thread(register_worker, os.environ["ROUTER"], os.environ["STRANGER"])
    return {"eval/own/reward": 1.0}


VALUES = {1: 0.3, 2: 0.9, 3: 0.5}


async def evaluate_by_table(args: Args, rollout_id: int, context: RolloutContext) -> dict[str, float]:
    """Return the engines' weights as a number, and the built-in evaluation; the rewards are made up."""
    [digest] = await context.engines.weights_checksum()
    return await Evaluator(args, context.tokenizer).run(rollout_id, context) | {
        "eval/own/reward": VALUES.get(rollout_id, 0.0),
        "eval/own/weights": zlib.crc32(digest.encode()),
        "eval/own/version": context.policy_version,
    }


class Numbers:
    """A user's data source."""

    def __init__(self, args: Args, tokenizer: object) -> None:
        self.next = 0

    @property
    def num_prompts(self) -> int:
        return 6

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        first, self.next = self.next, self.next + num
        return [
            [Sample(group_index=i, index=i, tokens=[1, 2, 3], prompt_length=3, label="7")]
            for i in range(first, self.next)
        ]

    def add_groups(self, groups: list[list[Sample]]) -> None:
        assert not groups

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


DAEMON = "daemon.pid"


def leave_a_daemon(args: Args, rollout_id: int, samples: list[Sample], metrics: dict[str, float]) -> None:
    """Leave a process in a session of its own, once, and its id in the run's directory.

    This is a --custom-rollout-log-function-path.
    """
    if rollout_id == 0:
        assert args.save is not None
        script = 'setsid sleep 86399 >/dev/null 2>&1 & echo $! > "$1"'
        subprocess.run(["sh", "-c", script, "sh", str(Path(args.save, DAEMON))], check=True)
