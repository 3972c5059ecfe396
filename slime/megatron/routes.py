"""Router replay: which passes of a training step take the experts that the engine chose.

Path: `trainer` asks before its first pass over a rollout; `microbatch` packs what is left. Invariant: the experts of an
engine go to the actor's passes alone. The engine had the actor's weights, so its choice is what the actor would have
made but for rounding; a reference or a critic has other routers, whose own choice is part of what they say.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.core.batch import TrainBatch


def for_actor(args: Args, batch: TrainBatch) -> TrainBatch:
    """The rollout as the actor takes it.

    Raises:
        ValueError: experts are to be replayed and samples carry none, or not those of this model.
    """
    if not args.use_routing_replay or args.loss_type == "sft_loss":
        return batch.without("routed_experts")
    shape = args.architecture
    assert shape is not None
    if not batch.has("routed_experts"):
        raise ValueError(
            "--use-routing-replay: the samples carry no routed_experts; engines give them where they run with "
            "--enable-return-routed-experts, and a generate function of yours has to keep them in the sample"
        )
    experts = batch.columns["routed_experts"]
    if experts.shape[1:] != (shape.num_moe_layers, shape.moe_router_topk) or experts.max() >= shape.num_experts:
        raise ValueError(
            f"--use-routing-replay: the samples' routed_experts are [layers, experts] {list(experts.shape[1:])} of "
            f"{int(experts.max()) + 1} or more experts; this model has {shape.num_moe_layers} layers of "
            f"{shape.num_experts} experts, {shape.moe_router_topk} a token: they are another model's"
        )
    return batch


def for_others(batch: TrainBatch) -> TrainBatch:
    """The same rollout as a reference takes it."""
    return batch.without("routed_experts")
