"""The notes next to the numbers of a plan's memory section: what is counted, and under which conditions.

- Used by: `summary`, for one row each.
- Invariant: no number is computed here except shares and totals of the numbers from `memory_model`.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.config.sharding import dense_ranks, expert_ranks, optimizer_ranks
from slime.plan.memory_model import EngineMemory, TrainMemory


def host_note(args: Args) -> str:
    """Return what the host memory is for."""
    note = "for each GPU"
    if args.colocate and args.offload:
        note += ": weights and optimizer while the engine has it"
    if args.save is not None and args.saves:
        note += ", and" if ":" in note else ":"
        note += " a copy of its share of a checkpoint while that is written"
    return f"{note}; {args.actor_num_gpus_per_node} of them on a node"


def sglang_note(args: Args, engine: EngineMemory) -> str:
    """Return how SGLang divides a GPU, whatever the plan's requests need."""
    share = args.sglang.get("mem_fraction_static")
    if share is None:
        return "SGLang takes --sglang-mem-fraction-static of a GPU for weights and KV, and queues what does not fit"
    whole = engine.peak / share / 2**30
    return (
        f"SGLang takes {share:.0%} of a GPU for weights and KV: one of {whole:,.0f} GiB holds all requests at once, "
        "on a smaller one some wait"
    )


def optimizer_note(args: Args, on_cuda: bool) -> str:
    """Return what the optimizer holds, where, and shared among how many ranks."""
    kinds = ["fp32 main weights"] if args.bf16 else []
    kinds += ["both moments"] if args.optimizer == "adam" else ["momentum"] if args.sgd_momentum > 0 else []
    if args.optimizer_cpu_offload:
        kinds.append("in host memory")
    ranks, of_experts = optimizer_ranks(args), expert_ranks(args) if args.num_experts else 0
    if args.use_distributed_optimizer:
        share = f"1/{dense_ranks(args)}"
        share += f" (of experts 1/{of_experts})" if of_experts and of_experts != dense_ranks(args) else ""
        kinds.append(f"a share of {share}: --use-distributed-optimizer, the default on GPUs; it changes no result")
    elif args.use_distributed_optimizer is None and ranks > 1:
        kinds.append("sharded (--use-distributed-optimizer) if Ray's cluster has GPUs")
    elif on_cuda and ranks > 1 and args.optimizer != "adam":
        kinds.append(f"not sharded over the {ranks} ranks: Megatron can only shard adam")
    return ", ".join(kinds)


def activations_note(args: Args, train: TrainMemory) -> str:
    """Return which tokens the activations are counted for."""
    recompute = f"{args.recompute_granularity} recompute" if args.recompute_granularity else "no recompute"
    parts = [f"kept for the backward pass of {train.tokens:,} tokens, {recompute}"]
    if args.use_dynamic_batch_size and args.max_tokens_per_gpu is not None and train.tokens > args.max_tokens_per_gpu:
        parts.append("for one response of full length, longer than --max-tokens-per-gpu")
    if args.pipeline_model_parallel_size > 1:
        parts.append(f"stage {train.stage}, the fullest")
    if args.num_experts:
        parts.append("if every expert gets equally many tokens")
    if args.spec:
        parts.append("--spec's layers counted as the built-in ones")
    return "; ".join(parts)
