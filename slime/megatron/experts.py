"""Mixture of experts: the router, with replay and balancing losses, and the experts, around Megatron's dispatcher.

Path: `layers` puts these into a layer's spec; `microbatch` says which tokens count and which experts an engine chose
(in the pack). Invariant: a token's experts and their weights depend on nothing but the token, so that a
layer yields the same however tokens are packed and dealt to ranks; padding counts in no balance.

Scores, choice and weights are float32. Balancing losses join the step's loss, whose gradients are summed over
micro-batches and ranks: each carries the share that it has of the step's tokens.

Shapes: _T tokens of this rank (under sequence parallelism a tensor-parallel rank's part), E experts, K chosen ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from slime.megatron.attention import PackedSequences
from slime.megatron.kernels import swiglu

# Without TransformerEngine megatron-core never makes this name, which the router's product asks for.
if not hasattr(moe_utils, "te_general_gemm"):
    setattr(moe_utils, "te_general_gemm", None)  # noqa: B010  # Megatron has no such name


LOAD_BALANCING, Z_LOSS = "load_balancing_loss", "z_loss"
"""Metrics of the balancing losses."""


class _WithLoss(torch.autograd.Function):
    """`values` as they are; going back, `loss` gets the gradient that a term of the step's loss has."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), dtype=torch.float32, device=gradients[0].device)


class Router(TopKRouter):
    """Megatron's router of which weights and buffers are used; what it computes is ours."""

    pack: PackedSequences | None = None
    """Of the forward under way, set by ExpertsLayer: also where a layer runs again in the backward pass."""
    replays = True
    """An engine's choice; not of a critic, see `routes`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[str, Tensor] = {}
        """[] each balancing loss of the step so far, before its coefficient; `balancing` takes them."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, 1, E] -> weights [T, E], 0 for those not chosen, and which were, bool."""
        assert self.pack is not None, "a layer of experts runs inside an ExpertsLayer"
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
        if self.training and torch.is_grad_enabled():  # neither log-probs, nor what is computed once more later
            weights = self._balanced(weights, logits, scores, routed)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routed

    def _chosen(self, scores: Tensor) -> Tensor:
        """[T, K]: the replayed experts, where there are any, else those of the best scores."""
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
        assert self.pack is not None
        if self.pack.experts_B is None or not self.replays:
            return chosen
        frequency = config.moe_layer_freq
        assert isinstance(frequency, list) and self.layer_number is not None
        layer = self.layer_number - 1 - frequency.index(1)
        given = self._ours(self.pack.experts_B[:, layer])
        return torch.where(given >= 0, given.to(chosen.dtype), chosen)

    def _ours(self, values_B: Tensor) -> Tensor:
        """Of a pack's tokens those that this rank routes."""
        if not self.config.sequence_parallel:
            return values_B
        return values_B.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _balanced(self, weights: Tensor, logits: Tensor, scores: Tensor, routed: Tensor) -> Tensor:
        """`weights`, with the balancing losses hung on; and tokens an expert counted for its bias."""
        pack, config = self.pack, self.config
        assert pack is not None
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
            dist.all_reduce(tokens_E, group=self.tp_cp_group)  # of the whole micro-batch
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


def choose_for_themselves(model: torch.nn.Module) -> None:
    """Routers of a model whose weights no engine has."""
    for module in model.modules():
        if isinstance(module, Router):
            module.replays = False


def with_float32_biases(model: torch.nn.Module) -> torch.nn.Module:
    """`model` in another dtype, its routers' biases and counts as they have to be."""
    for module in model.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            assert module.local_tokens_per_expert is not None
            module.expert_bias = module.expert_bias.float()
            module.local_tokens_per_expert = module.local_tokens_per_expert.float()
    return model


def attach(values: Tensor, loss: Tensor) -> Tensor:
    """`values`, through which `loss` joins the step's loss."""
    return _WithLoss.apply(values, loss)  # pyright: ignore[reportReturnType]


class Experts(SequentialMLP):
    """The experts that this rank holds, one behind the other; tokens come sorted by expert.

    An expert without a token runs all the same: its weights get a gradient, of zeros.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
            # Megatron gives experts a group of their own for their gradients with expert parallelism alone; without
            # it, it would sum them over ranks that hold other parts of an expert, or leave copies of one apart
            for parameter in self.parameters():
                parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        counts = tokens_per_expert.tolist()
        inputs = permuted_local_hidden_states.split(counts)
        outputs: list[Tensor] = []
        for expert, tokens, weights in zip(self.local_experts, inputs, permuted_probs.split(counts), strict=True):
            parts: Any = expert
            hidden = swiglu(parts.linear_fc1(tokens)[0])
            outputs.append(parts.linear_fc2((hidden * weights[:, None]).to(hidden.dtype))[0])
        return torch.cat(outputs), None


class ExpertsLayer(TransformerLayer):
    """A transformer layer of experts: its router gets to know the micro-batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        router: Any = self.mlp.router
        router.pack = kwargs["packed_seq_params"]
        try:
            return super().forward(*args, **kwargs)
        finally:
            router.pack = None
