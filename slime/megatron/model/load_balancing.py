"""Balancing of experts over a whole step: router biases move once, and auxiliary losses are summed over all ranks.

- Used by: `step`, after the last micro-batch; while micro-batches run, `experts.Router` counts tokens and adds up
  losses.
- Invariant: a step that is skipped moves no bias, and its counts do not enter the next step.

Shapes: L routers of this stage, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import Tensor

from slime.megatron import device
from slime.megatron.model.build import ModelChunks, unwrap
from slime.megatron.model.moe import LOAD_BALANCING, Z_LOSS, Router


def routers_of(model: ModelChunks) -> Iterator[Router]:
    """Yield the routers of this stage's layers, in order."""
    for chunk in model:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


@torch.no_grad()
def move_biases(model: ModelChunks, left_out: Tensor) -> None:
    """Move each router's bias by the number of tokens that its experts got in this step, then reset the counts.

    Megatron moves the biases when it finalizes gradients. That is too early: nobody can know then whether the step is
    taken. Collective over the ranks of a stage; nothing waits for the device.

    Args:
        left_out: [] 1 if the optimizer did not take the step; the biases then keep their values.
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
    """Return the coefficient of each auxiliary loss that the model is trained with, by the name of its metric."""
    config = unwrap(model[0]).config
    if not config.num_moe_experts:
        return {}
    assert not isinstance(config.moe_aux_loss_coeff, list)
    found = {LOAD_BALANCING: config.moe_aux_loss_coeff, Z_LOSS: config.moe_z_loss_coeff or 0.0}
    return {name: coefficient for name, coefficient in found.items() if coefficient}


def step_losses(model: ModelChunks) -> Mapping[str, Tensor]:
    """Return each auxiliary loss of the step, before its coefficient, as a [] float64 tensor: the sum over all layers.

    Collective over all ranks, and every rank gets the result; nothing waits for the device. The routers' sums start at
    zero again.
    """
    names = list(coefficients(model))
    if not names:
        return {}
    sums = torch.zeros(len(names), dtype=torch.float64, device=device.device())
    for router in routers_of(model):
        sums += torch.stack([router.losses.pop(name, sums.new_zeros(())).double() for name in names])
    dist.all_reduce(sums)  # every rank routes different tokens: with TP the rules require sequence parallelism
    return dict(zip(names, sums.unbind(), strict=True))
