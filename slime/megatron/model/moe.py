"""Mixture of experts (MoE): a router with replay and auxiliary losses, and a layer that shows it the micro-batch.

- Used by: `layers` puts these classes into a layer's spec. `microbatch` passes in, with the pack, which tokens count
  and which experts an engine chose. `step` moves biases and sums auxiliary losses after the last micro-batch.
- Invariant: a token's experts and their weights depend on nothing but the token, so a layer's output does not depend on
  how tokens are packed and dealt to ranks. Padding does not count in any balance. A step that is skipped moves no bias,
  and its counts do not enter the next step.

Scores, the choice and the weights are float32. Auxiliary losses join the step's loss, whose gradients are summed over
micro-batches and ranks. So each micro-batch divides its loss by the tokens of the whole step, not by its own.

Shapes: t tokens that this rank routes (under sequence parallelism a tensor-parallel rank's part of the B packed ones),
E experts, K chosen experts per token, L routers of this stage.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.megatron import device
from slime.megatron.model.attention import PackedSequences
from slime.megatron.model.layer import PackedLayer
from slime.megatron.model.local_dispatch import LocalDispatcher

logger = logging.getLogger(__name__)

LOAD_BALANCING, Z_LOSS = "load_balancing_loss", "z_loss"
"""The metric names of the auxiliary losses."""


class _WithLoss(torch.autograd.Function):
    """Identity on `values` that adds `loss` to the backward pass, as Megatron's MoEAuxLossAutoScaler does.

    `loss` gets the gradient 1, like any other term of the step's loss.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=torch.float32, device=gradients[0].device)


class ExpertRouter(TopKRouter):
    """A router with the weights and buffers of Megatron's TopKRouter; the routing itself is implemented here."""

    given_pack: PackedSequences | None = None
    """Set by ExpertsLayer during its forward pass, also if the layer is recomputed."""
    replays = True
    """Whether it replays an engine's choice; False for a critic, see `routing_replay`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[str, Tensor] = {}
        """Each auxiliary loss of the step so far, [] and before its coefficient; `step_losses` takes them."""

    @property
    def pack(self) -> PackedSequences:
        """The pack of the current forward pass."""
        if self.given_pack is None:
            raise RuntimeError("a layer of experts runs inside an ExpertsLayer")
        return self.given_pack

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turn logits [t, 1, E] into weights [t, E], 0 for experts that are not chosen, and the choice [t, E] bool."""
        logits = logits.flatten(0, -2).float()
        sigmoid = self.score_function == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        chosen = self._chosen(scores.detach())
        weights = scores.gather(1, chosen)
        if sigmoid or not self.config.moe_router_pre_softmax:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
        if self.config.moe_router_topk_scaling_factor is not None:
            weights = weights * self.config.moe_router_topk_scaling_factor
        routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        if self.training and torch.is_grad_enabled():  # not for log-probs, nor in a pass that is recomputed later
            weights = self._balanced(weights, logits, scores, routed)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routed

    def _chosen(self, scores: Tensor) -> Tensor:
        """Return [t, K]: the replayed experts if the pack has them, otherwise those with the best scores."""
        config = self.config
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        groups, best = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
        if groups > best:
            grouped = choice.unflatten(1, (groups, -1))
            of_groups = grouped.topk(2, dim=-1).values.sum(-1)
            kept = torch.zeros_like(of_groups, dtype=torch.bool)
            kept.scatter_(1, of_groups.topk(best, dim=-1).indices, True)
            choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        chosen = choice.topk(self.topk, dim=-1).indices
        if self.pack.experts_B is None or not self.replays:
            return chosen
        frequency = config.moe_layer_freq
        assert isinstance(frequency, list) and self.layer_number is not None
        layer = self.layer_number - 1 - frequency.index(1)
        given = self._ours(self.pack.experts_B[:, layer])
        return replayed(given, chosen)

    def _ours(self, values_B: Tensor) -> Tensor:
        """Select the tokens that this rank routes from those of a pack."""
        if not self.config.sequence_parallel:
            return values_B
        return values_B.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _balanced(self, weights: Tensor, logits: Tensor, scores: Tensor, routed: Tensor) -> Tensor:
        """Return `weights` with the auxiliary losses attached, and count tokens per expert for the bias."""
        pack, config = self.pack, self.config
        if pack.counts_B is None:
            return weights
        counts = self._ours(pack.counts_B)
        here = routed & counts[:, None]
        if self.expert_bias is not None:
            assert self.local_tokens_per_expert is not None
            self.local_tokens_per_expert += here.sum(0)
        if not pack.step_tokens:
            return weights
        if config.moe_z_loss_coeff:
            loss = torch.where(counts, logits.logsumexp(-1).square(), 0.0).sum()
            weights = attach(weights, config.moe_z_loss_coeff / pack.step_tokens * loss)
            self._add_up(Z_LOSS, loss / pack.step_tokens)
        if config.moe_aux_loss_coeff:
            assert not isinstance(config.moe_aux_loss_coeff, list)
            tokens_E = here.sum(0).float()
            dist.all_reduce(tokens_E, group=self.tp_cp_group)  # sum over the whole micro-batch
            if self.score_function == "sigmoid":
                scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            scores_E = torch.where(counts[:, None], scores, 0.0).sum(0)
            loss = (scores_E * tokens_E).sum() * len(tokens_E) / tokens_E.sum().clamp(min=1.0)
            weights = attach(weights, config.moe_aux_loss_coeff / pack.step_tokens * loss)
            self._add_up(LOAD_BALANCING, loss / pack.step_tokens)
        return weights

    def _add_up(self, name: str, loss: Tensor) -> None:
        found = loss.detach().double()
        self.losses[name] = self.losses[name] + found if name in self.losses else found


def replayed(given: Tensor, chosen: Tensor) -> Tensor:
    """Return the experts of each token [t, K]: those that are given, where they are not negative, or those chosen here.

    No router chooses an expert twice. A row in which one would be twice has less than K experts, so it is not replayed.
    """
    found = torch.where(given >= 0, given.to(chosen.dtype), chosen)
    twice = (found.sort(dim=1).values.diff(dim=1) == 0).any(1, keepdim=True)
    return torch.where(twice, chosen, found)


def disable_replay(model: torch.nn.Module) -> None:
    """Turn off replay in the routers of a model whose weights no engine has."""
    for module in model.modules():
        if isinstance(module, ExpertRouter):
            module.replays = False


def with_float32_biases(model: torch.nn.Module) -> torch.nn.Module:
    """Return `model`, converted to another dtype before, with its routers' biases and counts in float32 again."""
    for module in model.modules():
        if isinstance(module, ExpertRouter) and module.expert_bias is not None:
            assert module.local_tokens_per_expert is not None
            module.expert_bias = module.expert_bias.float()
            module.local_tokens_per_expert = module.local_tokens_per_expert.float()
    return model


def attach(values: Tensor, loss: Tensor) -> Tensor:
    """Return `values` unchanged, and let `loss` join the step's loss in the backward pass."""
    return _WithLoss.apply(values, loss)  # pyright: ignore[reportReturnType]


@cache
def _warn_of_no_overlap() -> None:
    """Log it once."""
    logger.warning("--moe-shared-expert-overlap has no effect: a CPU has no second stream")


class ExpertsLayer(PackedLayer):
    """A transformer layer of experts, which shows the micro-batch's pack to its router."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        experts: Any = self.mlp
        if experts.experts.ep_group.size() == experts.experts.tp_group.size() == 1:
            experts.token_dispatcher = LocalDispatcher(self.config, get_default_pg_collection())
            if experts.shared_expert_overlap and experts.shared_experts is not None:
                experts.token_dispatcher.set_shared_experts(experts.shared_experts)
        if experts.shared_expert_overlap and experts.shared_experts is not None and not device.on_cuda():
            _warn_of_no_overlap()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        router: Any = self.mlp.router
        router.given_pack = kwargs["packed_seq_params"]
        try:
            return super().forward(*args, **kwargs)
        finally:
            router.given_pack = None


# --- balancing over a whole step: biases move once, and auxiliary losses are summed over all ranks


def routers_of(model: Iterable[torch.nn.Module]) -> Iterator[ExpertRouter]:
    """Yield the routers of this stage's layers, in order."""
    for chunk in model:
        yield from (module for module in chunk.modules() if isinstance(module, ExpertRouter))


@torch.no_grad()
def move_biases(model: Iterable[torch.nn.Module], left_out: Tensor) -> None:
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


def coefficients(config: TransformerConfig) -> dict[str, float]:
    """Return the coefficient of each auxiliary loss that a model is trained with, by the name of its metric."""
    if not config.num_moe_experts:
        return {}
    assert not isinstance(config.moe_aux_loss_coeff, list)
    found = {LOAD_BALANCING: config.moe_aux_loss_coeff, Z_LOSS: config.moe_z_loss_coeff or 0.0}
    return {name: coefficient for name, coefficient in found.items() if coefficient}


def step_losses(model: Iterable[torch.nn.Module], names: Collection[str], device: torch.device) -> dict[str, Tensor]:
    """Return each auxiliary loss of the step, before its coefficient, as a [] float64 tensor: the sum over all layers.

    Collective over all ranks, and every rank gets the result; nothing waits for the device. The routers' sums start at
    zero again.

    Args:
        names: the losses, as `coefficients` has them, equal on every rank; a stage may have no router.
    """
    if not names:
        return {}
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for router in routers_of(model):
        sums += torch.stack([router.losses.pop(name, sums.new_zeros(())).double() for name in names])
    dist.all_reduce(sums)  # every rank routes different tokens: with TP the rules require sequence parallelism
    return dict(zip(names, sums.unbind(), strict=True))
