"""Timed trainers: the seconds of a rollout's training from its real packing and the FLOPs of each rank.

- Used by: `loop`, in `train`.
- Invariant: in every training each rank is busy for its own FLOPs, and idle until the slowest rank has ended, so busy
  and idle sum to the wall time.

Ranks wait for each other once in every optimizer step, where gradients are summed. A pipeline of P stages is filled and
emptied in each step, and its stages wait for each other where micro-batches differ (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.config.args import Args
from slime.config.pipeline_stages import num_chunks, stage_layers
from slime.config.rollout_plan import plan_rollout
from slime.core.packing import StepPlan, training_flops
from slime.simulate.pipeline import FORWARD, pipeline_times


@dataclass(frozen=True)
class Training:
    """One rollout's training: its wall seconds, and the busy seconds of each data-parallel rank."""

    seconds: float
    busy: list[float]
    tokens: int
    micro_batches: int


class TimedTrainers:
    """The trainers of a run, each of whose GPUs computes `flops` a second."""

    def __init__(self, args: Args, flops: float) -> None:
        self._args = args
        self.ranks = args.data_parallel_size
        self.gpus_of_rank = args.actor_world_size // self.ranks
        self._flops_of = training_flops(args.resolved.architecture)
        self._speed = flops * self.gpus_of_rank

    def train(self, lengths: Sequence[int]) -> Training:
        """Return the training on samples of these lengths, in tokens of prompt and response."""
        plans = self.plan(lengths)
        args = self._args
        stages, parts = args.pipeline_model_parallel_size, num_chunks(args)
        busy = [0.0] * self.ranks
        seconds = 0.0
        for plan in plans:
            costs = [[self._seconds(lengths, rows) for rows in rank] for rank in plan.micro_batches]
            seconds += float(pipeline_times(costs, stages, parts=parts).max())
            busy = [before + sum(rank) for before, rank in zip(busy, costs, strict=True)]
        return Training(seconds, busy, sum(lengths), sum(plan.num_micro_batches for plan in plans))

    def plan(self, lengths: Sequence[int]) -> list[StepPlan]:
        """Plan steps and micro-batches with the trainers' own packing."""
        steps = self._args.resolved.num_steps_per_rollout
        return plan_rollout(self._args, lengths, num_ranks=self.ranks, num_steps=steps)

    def _seconds(self, lengths: Sequence[int], rows: Sequence[int]) -> float:
        """Return the seconds of a micro-batch on the GPUs of one rank, without waiting."""
        return self._passes * sum(self._flops_of(lengths[row]) for row in rows) / self._speed

    @property
    def _passes(self) -> float:
        """The FLOPs of all passes over a sample, as a multiple of one forward and backward pass."""
        args = self._args
        first = args.loss_type != "sft_loss" and (args.resolved.num_steps_per_rollout > 1 or args.needs_kl_first)
        forwards = first + args.needs_reference + _recomputed(args)
        return (1 + FORWARD * forwards) * (2 if args.uses_critic else 1)


def _recomputed(args: Args) -> float:
    """Return the share of the layers whose forward pass is repeated in the backward pass."""
    if args.recompute_granularity != "full":
        return 0.0
    if args.recompute_method != "block":
        return 1.0
    layers = max(stage_layers(args, args.resolved.architecture))
    return min((args.recompute_num_layers or 1) / layers, 1.0)
