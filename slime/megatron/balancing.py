"""Balance of experts over a whole step: routers' biases move once, and balancing losses are summed over all ranks.

Path: `experts.Router` counts tokens and adds up losses while micro-batches run; `step` calls this after the last one.
Invariant: a step that is left out moves no bias, and its counts do not enter the next step.

Shapes: L routers of this stage, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import Tensor

from slime.megatron import device
from slime.megatron.build import ModelChunks, unwrap
from slime.megatron.experts import LOAD_BALANCING, Z_LOSS, Router


def routers_of(model: ModelChunks) -> Iterator[Router]:
    """The routers of this stage's layers, in order."""
    for chunk in model:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


@torch.no_grad()
def move_biases(model: ModelChunks, left_out: Tensor) -> None:
    """Move each router's bias by the tokens that its experts got in this step, and start to count again.

    Megatron moves biases when it finalizes gradients, before anybody can know whether the step is taken. Collective
    over the ranks of a stage; nothing waits for the device.

    Args:
        left_out: [] 1 where the optimizer did not take the step: biases then stay as they are.
    """
    routers = [router for router in routers_of(model) if router.expert_bias is not None]
    if not routers:
        return
    counts: list[Tensor] = []
    biases: list[Tensor] = []
    for router in routers:
        assert router.expert_bias is not None and router.local_tokens_per_expert is not None
        counts.append(router.local_tokens_per_expert)
        biases.append(router.expert_bias)
    before_LE = torch.stack(biases)
    rate = routers[0].config.moe_router_bias_update_rate
    moved_LE = get_updated_expert_bias(torch.stack(counts), before_LE, rate)
    for bias, after in zip(biases, torch.where(left_out > 0, before_LE, moved_LE), strict=True):
        bias.copy_(after)
    for count in counts:
        count.zero_()


def coefficients(model: ModelChunks) -> dict[str, float]:
    """The coefficient of each balancing loss that the model is trained with, by the metric's name."""
    config = unwrap(model[0]).config
    if not config.num_moe_experts:
        return {}
    assert not isinstance(config.moe_aux_loss_coeff, list)
    found = {LOAD_BALANCING: config.moe_aux_loss_coeff, Z_LOSS: config.moe_z_loss_coeff or 0.0}
    return {name: coefficient for name, coefficient in found.items() if coefficient}


def step_losses(model: ModelChunks) -> Mapping[str, Tensor]:
    """[] float64 of each balancing loss, before its coefficient: the step's sum over layers, on every rank.

    Collective over all ranks; nothing waits for the device. Routers start to add up again.
    """
    names = list(coefficients(model))
    if not names:
        return {}
    sums = torch.zeros(len(names), dtype=torch.float64, device=device.device())
    for router in routers_of(model):
        sums += torch.stack([router.losses.pop(name, sums.new_zeros(())).double() for name in names])
    dist.all_reduce(sums)  # each rank routes other tokens: the rules want sequence parallelism with tensor parallelism
    return dict(zip(names, sums.unbind(), strict=True))
