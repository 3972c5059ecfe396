"""The default of --use-distributed-optimizer, and the number of ranks that shard the optimizer's state.

- Used by: `parse`, once the model is known, and `cluster`, if the default depends on the GPUs of Ray's cluster.
- Invariant: a given flag is never changed, and resolving twice changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from slime.config.args import Args
from slime.config.resolve import for_gpus, joins_ray


def dense_ranks(args: Args) -> int:
    """Return the number of ranks that hold the same weight outside experts: data-parallel x context-parallel ranks."""
    return args.data_parallel_size * args.context_parallel_size


def expert_ranks(args: Args) -> int:
    """Return the number of ranks that hold the same expert's weight; only for a model with experts."""
    block = args.expert_model_parallel_size * args.expert_tensor_size * args.pipeline_model_parallel_size
    return args.actor_world_size // block


def optimizer_ranks(args: Args) -> int:
    """Return the number of ranks that hold the same weight and can shard its optimizer state.

    With 1 or less there is nothing to shard. Experts have their own groups, which may be larger if
    --expert-tensor-parallel-size is less than --tensor-model-parallel-size; the larger number counts.
    """
    return max(dense_ranks(args), expert_ranks(args)) if args.num_experts else dense_ranks(args)


def resolve_sharding(args: Args) -> Args:
    """Return Args in which --use-distributed-optimizer is on or off.

    It stays open in one case: this machine has no GPU, but the Ray cluster that the run joins may have some.
    """
    if not for_gpus(args) and joins_ray():
        return args
    return shard_optimizer(args, on_gpus=for_gpus(args))


def shard_optimizer(args: Args, *, on_gpus: bool) -> Args:
    """Return Args in which an unset --use-distributed-optimizer is on if it saves GPU memory.

    On a CPU it stays off: ranks share one memory there, and a seeded run keeps its bits. Megatron can only shard Adam.
    """
    if args.use_distributed_optimizer is not None:
        return args
    shards = on_gpus and args.optimizer == "adam" and optimizer_ranks(args) > 1
    return replace(args, use_distributed_optimizer=shards)
