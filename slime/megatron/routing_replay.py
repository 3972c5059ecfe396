"""Routing replay: which forward passes of a training step use the experts that the engine chose.

- Used by: `trainer`, before its first pass over a rollout; `microbatch` packs the experts that are left.
- Invariant: an engine's choice is replayed in the actor's passes only. The engine had the actor's weights, so apart
  from rounding its choice is the actor's. A reference model or a critic has other routers, and their own choice is part
  of their output.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.share import Share


def for_actor(args: Args, share: Share) -> TrainBatch:
    """Return the own rows for the actor's passes. Collective.

    Raises:
        ValueError: experts are to be replayed, and the samples have none, or not those of this model.
    """
    batch = share.own
    if not args.use_routing_replay or args.loss_type == "sft_loss":
        return batch.without("routed_experts")
    arch = args.resolved.architecture
    if not batch.has("routed_experts"):
        raise ValueError(
            "--use-routing-replay: the samples carry no routed_experts; engines return them if they run with "
            "--enable-return-routed-experts, and a generate function of yours has to keep them in the sample"
        )
    experts = batch.columns["routed_experts"]
    [highest] = share.largest(int(experts.max()) if experts.size else -1)
    if experts.shape[1:] != (arch.num_moe_layers, arch.moe_router_topk) or highest >= arch.num_experts:
        raise ValueError(
            f"--use-routing-replay: the samples' routed_experts are [layers, experts] {list(experts.shape[1:])} of "
            f"{highest + 1:.0f} or more experts; this model has {arch.num_moe_layers} layers of "
            f"{arch.num_experts} experts, {arch.moe_router_topk} for each token: the samples are another model's"
        )
    return batch


def for_others(batch: TrainBatch) -> TrainBatch:
    """Return the rows for the passes of a reference model or a critic: without an engine's choice."""
    return batch.without("routed_experts")
