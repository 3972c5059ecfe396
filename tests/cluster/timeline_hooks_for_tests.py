"""Hooks that record, or decide, when something happens: on the machine's monotonic clock, or in order."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slime.config.args import Args
from slime.core.batch import Array, TrainBatch, from_samples
from slime.core.sample import Sample
from slime.engine.protocol import SamplingParams
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.generate import generate_sample
from slime.rollout.sft_rollout import fill_responses

TRAINING_S = 1.5
"""The additional time of training in seconds."""
LIMIT_S = 30.0
"""Seconds after which a generation no longer waits for training: without overlap, the test of the overlap fails."""


@dataclass(frozen=True)
class Span:
    start: float
    end: float

    def overlaps(self, other: Span) -> bool:
        return self.start < other.end and other.start < self.end


def _write(args: Args, kind: str, name: int, start: float) -> None:
    assert args.save is not None
    with Path(args.save, f"{kind}.jsonl").open("a") as file:
        file.write(json.dumps([name, start, time.monotonic()]) + "\n")


def read_spans(save: Path, kind: str) -> dict[int, list[Span]]:
    spans: dict[int, list[Span]] = {}
    for line in (save / f"{kind}.jsonl").read_text().splitlines():
        name, start, end = json.loads(line)
        spans.setdefault(name, []).append(Span(start, end))
    return spans


def _begun(args: Args, rollout_id: int) -> Path:
    """Return the file that is there once training on a rollout has begun."""
    assert args.save is not None
    return Path(args.save, f"training-{rollout_id}.begun")


async def generate(args: Args, sample: Sample, params: SamplingParams, context: RolloutContext) -> Sample:
    """Work like the built-in function, and record the time; but end only once training on the last rollout has begun.

    Otherwise a short generation could end while the trainer still prepares its first step.
    """
    start = time.monotonic()
    sample = await generate_sample(args, sample, params, context)
    rollout_id = sample.metadata.get("start_rollout_id")
    if rollout_id is not None:  # absent in an evaluation
        while rollout_id > 0 and not _begun(args, rollout_id - 1).exists() and time.monotonic() < start + LIMIT_S:
            await asyncio.sleep(0.02)
        _write(args, "generation", rollout_id, start)
    return sample


async def fail_last(args: Args, sample: Sample, params: SamplingParams, context: RolloutContext) -> Sample:
    """Fail to generate the last rollout."""
    assert args.num_rollout is not None
    if sample.group_index // args.rollout_batch_size == args.num_rollout - 1:
        raise ValueError("no last rollout")
    return await generate_sample(args, sample, params, context)


def last_but_one_without_end(args: Args, batch: TrainBatch) -> Array:
    """Return the rewards; but train on the last rollout but one for so long that no test would wait for it."""
    assert args.num_rollout is not None
    if int(batch.columns["group_indices"][0]) // args.rollout_batch_size == args.num_rollout - 2:
        time.sleep(600)
    return _rewards(batch)


def advantages(args: Args, batch: TrainBatch) -> Array:
    """Return the rewards after a delay; record under the batch's first group, which identifies the rollout."""
    start, rollout_id = time.monotonic(), int(batch.columns["group_indices"][0]) // args.rollout_batch_size
    _begun(args, rollout_id).touch()
    time.sleep(TRAINING_S)
    _write(args, "training", rollout_id, start)
    return _rewards(batch)


def _rewards(batch: TrainBatch) -> Array:
    return np.repeat(batch.columns["rewards"], batch.response_lengths_N).astype(np.float32)


GO_ON = asyncio.Event()


async def draw_and_wait(args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext) -> RolloutResult:
    """Draw the groups of a rollout, and finish it only after a test sets GO_ON."""
    groups = data_source.get_groups(args.rollout_batch_size, rollout_id=rollout_id)
    await GO_ON.wait()
    fill_responses(args, [sample for group in groups for sample in group], context)
    return RolloutResult(groups, {"rollout/reward": 0.5, "time/generation": 1.0})


def spoil(args: Args, samples: list[Sample]) -> TrainBatch:
    """Make training data by changing the samples."""
    for sample in samples:
        sample.reward = 7.0
    return from_samples(samples)
