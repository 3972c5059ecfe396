"""Timed trainers: the seconds of a rollout's training from its real packing and the FLOPs of each rank.

- Used by: `loop`, in `train`.
- Invariant: in every training each rank is busy for its own FLOPs, and idle until the slowest rank has ended, so busy
  and idle sum to the wall time.

Ranks wait for each other once in every optimizer step, where gradients are summed. A pipeline of P stages is filled and
emptied in each step: with M micro-batches it takes (M + P - 1) / M times as long (P - 1 becomes (P - 1) / V with V
virtual stages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime.config.args import Args
from slime.config.pipeline_stages import count_multiple, num_chunks, stage_layers
from slime.core.packing import StepPlan, plan_steps, training_flops

FORWARD = 1 / 3
"""The FLOPs of a forward pass, as a share of forward and backward."""


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
        busy = [0.0] * self.ranks
        seconds = 0.0
        for plan in plans:
            costs = [
                self._passes * sum(self._flops_of(lengths[row]) for rows in rank for row in rows) / self._speed
                for rank in plan.micro_batches
            ]
            seconds += max(costs) * self._bubble(plan)
            busy = [before + cost for before, cost in zip(busy, costs, strict=True)]
        return Training(seconds, busy, sum(lengths), sum(plan.num_micro_batches for plan in plans))

    def plan(self, lengths: Sequence[int]) -> list[StepPlan]:
        """Plan steps and micro-batches with the trainers' own packing."""
        args = self._args
        context = args.context_parallel_size
        row_multiple = 2 * context if context > 1 else 1
        tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
        budget = args.max_tokens_per_gpu if args.use_dynamic_batch_size else None
        return plan_steps(
            lengths,
            num_steps=args.resolved.num_steps_per_rollout,
            dp_size=self.ranks,
            max_tokens=None if budget is None else budget * context,
            micro_batch_size=args.micro_batch_size,
            multiple=max(row_multiple, context * tensor),
            row_multiple=row_multiple,
            balance=args.balance_data,
            flops=self._flops_of,
            count_multiple=count_multiple(args),
        )

    @property
    def _passes(self) -> float:
        """The FLOPs of all passes over a sample, as a multiple of one forward and backward pass."""
        args = self._args
        first = args.loss_type != "sft_loss" and (args.resolved.num_steps_per_rollout > 1 or args.needs_kl_first)
        forwards = first + args.needs_reference + _recomputed(args)
        return (1 + FORWARD * forwards) * (2 if args.uses_critic else 1)

    def _bubble(self, plan: StepPlan) -> float:
        stages = self._args.pipeline_model_parallel_size
        return 1 + (stages - 1) / num_chunks(self._args) / plan.num_micro_batches


def _recomputed(args: Args) -> float:
    """Return the share of the layers whose forward pass is repeated in the backward pass."""
    if args.recompute_granularity != "full":
        return 0.0
    if args.recompute_method != "block":
        return 1.0
    layers = max(stage_layers(args, args.resolved.architecture))
    return min((args.recompute_num_layers or 1) / layers, 1.0)
