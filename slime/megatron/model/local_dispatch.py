"""The way of tokens to experts and back on a rank that holds all experts whole, without waiting for the device.

- Used by: `moe.ExpertsLayer`, in place of Megatron's all-to-all dispatcher, if no rank shares the experts.
- Invariant: the order of tokens is that of Megatron's dispatcher: by expert, and by token within an expert. Nothing is
  added up by atomics, so the same inputs give the same bits.

Megatron's dispatcher copies the number of tokens of each expert to the host, and waits for it. Here only the device
knows these numbers: a token goes to K different experts, so the size of every tensor is known.

    2 experts of 3, tokens a and b:      a -> 0, 2     b -> 1, 2
    sorted rows:                         a0  b1  a2  b2
    token_of                             0   1   0   1       the token of each row
    rows_of                              a: 0, 2   b: 1, 3   the rows of each token

Shapes: t tokens, E experts, K experts of a token, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from slime.megatron.model.kernels import row_sums


@dataclass(frozen=True)
class Order:
    """The rows of tokens sorted by expert."""

    entries: Tensor
    """[t K] int64: each row's place in a flattened [t, E]."""
    token_of: Tensor
    """[t K] int64"""
    rows_of: Tensor
    """[t, K] int64"""

    @classmethod
    def of(cls, routed: Tensor, top_k: int) -> Order:
        """Sort by expert: `routed` [t, E] bool is True for the `top_k` experts of each token."""
        tokens, experts = routed.shape
        by_expert = routed.t().flatten()
        places = torch.nonzero_static(by_expert, size=tokens * top_k).squeeze(1)  # `nonzero` would wait for its size
        token_of = places % tokens
        rows_of = token_of.argsort(stable=True).view(tokens, top_k)
        return cls(token_of * experts + places // tokens, token_of, rows_of)


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.rows_of)
        return tokens.index_select(0, order.token_of)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return row_sums(gradients[0], *ctx.saved_tensors), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.token_of)
        return row_sums(rows, order.rows_of)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, *ctx.saved_tensors), None


def sorted_by_expert(tokens: Tensor, order: Order) -> Tensor:
    """Copy each token [t, H] to the rows of its experts: [t K, H]."""
    return _Sort.apply(tokens, order)  # pyright: ignore[reportReturnType]


def summed_by_token(rows: Tensor, order: Order) -> Tensor:
    """Add up the rows [t K, H] of each token: [t, H]."""
    return _Sum.apply(rows, order)  # pyright: ignore[reportReturnType]


class LocalDispatcher(MoETokenDispatcher):
    """A dispatcher of one rank, with the steps that Megatron's layer calls in this order."""

    _order: Order | None = None
    _tokens_E: Tensor | None = None
    _shape: torch.Size | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Sort tokens [..., H] by expert.

        Args:
            routing_map: [t, E] bool.
            probs: [t, E] float32, the router's weights.

        Returns:
            [t K, H], and the weight of each row [t K].
        """
        self._shape = tokens.shape
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(tokens)
        self._order = Order.of(routing_map, self.config.moe_router_topk)
        self._tokens_E = routing_map.sum(0)
        rows = sorted_by_expert(tokens.flatten(0, -2), self._order)
        return rows, probs.flatten().index_select(0, self._order.entries)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are: all experts are here."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows [t K, H], the number of rows of each expert [E] on their device, and the weights [t K]."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
        assert self._tokens_E is not None
        return hidden_states, self._tokens_E, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the experts' outputs as they are."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return the experts' outputs as they are."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up the outputs [t K, H] of each token's experts, in the shape of the tokens; and forget the order."""
        assert self._order is not None and self._shape is not None
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
        output = summed_by_token(hidden_states, self._order).view(self._shape)
        self._order = self._tokens_E = self._shape = None
        return output if self.shared_experts is None else output + self.shared_experts.get_output()
