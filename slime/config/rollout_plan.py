"""The plan of a rollout's training: which data-parallel rank takes which rows, in which steps and micro-batches.

- Used by: the rollout manager, which sends each rank its part, and `Trainer` for a batch that did not come from there.
- Invariant: the plan depends on the flags and on the rows' lengths alone, not on who makes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.config.args import Args
from slime.config.pipeline_stages import count_multiple
from slime.core.batch import TrainBatch
from slime.core.packing import StepPlan, pack_multiple, plan_steps, row_multiple, training_flops
from slime.core.rank_batch import RankBatch, rank_batches


def data_parallel_rank(args: Args, rank: int) -> int:
    """Return the data-parallel rank of a trainer: Megatron numbers tensor ranks first, then context, data, pipeline."""
    return rank // (args.tensor_model_parallel_size * args.context_parallel_size) % args.data_parallel_size


def token_budget(args: Args) -> int | None:
    """Return the most tokens of one micro-batch, over its context-parallel ranks; None without dynamic batches.

    Raises:
        ValueError: --max-tokens-per-gpu is missing.
    """
    if not args.use_dynamic_batch_size:
        return None
    if args.max_tokens_per_gpu is None:
        raise ValueError("--use-dynamic-batch-size: --max-tokens-per-gpu is not given; give the token budget")
    return args.max_tokens_per_gpu * args.context_parallel_size


def plan_rollout(args: Args, total_lengths: Sequence[int], *, num_ranks: int, num_steps: int) -> list[StepPlan]:
    """Plan rows of these lengths by --max-tokens-per-gpu or --micro-batch-size, for `num_ranks` data-parallel ranks.

    Raises:
        ValueError: the rows cannot be cut into `num_steps` equal steps.
    """
    context = args.context_parallel_size
    return plan_steps(
        total_lengths,
        num_steps=num_steps,
        dp_size=num_ranks,
        max_tokens=token_budget(args),
        micro_batch_size=args.micro_batch_size,
        multiple=pack_multiple(context, args.tensor_model_parallel_size),  # sequence parallelism cuts into TP parts
        row_multiple=row_multiple(context),
        balance=args.balance_data,
        flops=training_flops(args.resolved.architecture),
        count_multiple=count_multiple(args),
        lockstep=args.pipeline_model_parallel_size > 1 or args.expert_model_parallel_size > 1,
    )


def parts_of_rollout(args: Args, batch: TrainBatch, *, num_ranks: int, num_steps: int) -> list[RankBatch]:
    """Return the part of each of `num_ranks` data-parallel ranks of a rollout that is trained on in `num_steps` steps.

    Raises:
        ValueError: the rows cannot be cut into equal steps.
    """
    lengths: list[int] = batch.total_lengths_N.tolist()
    plans = plan_rollout(args, lengths, num_ranks=num_ranks, num_steps=num_steps)
    return rank_batches(batch, plans, _metrics(args, lengths, plans))


def _metrics(args: Args, lengths: Sequence[int], plans: Sequence[StepPlan]) -> dict[str, float]:
    metrics = {"train/num_micro_batches": float(sum(plan.num_micro_batches for plan in plans))}
    budget = token_budget(args)
    if budget is not None:
        fills = [plan.fill(lengths, budget) for plan in plans]
        metrics["train/fill"] = sum(fills) / len(fills)
    if len(plans[0].micro_batches) > 1:
        flops = training_flops(args.resolved.architecture)
        metrics["train/dp_imbalance"] = max(plan.imbalance(lengths, flops) for plan in plans)
    return metrics
