"""The second half of a decoder layer: one gated MLP, or a router and many experts.

- Called by: `model` calls these for each layer, in prefill and in decoding.
- Invariant: a token's experts, their weights and their sum are functions of its own hidden state. The other tokens of a
  batch change at most the last bits, and not even those if `every` expert is computed for all rows (`fixed_shapes`).

Shapes: N tokens, K experts of a token, E experts of the layer, F channels inside an expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.core.architecture import Architecture


@dataclass(frozen=True)
class Dense:
    """A SwiGLU MLP: `gate_up` [2F, H], gates first; `down` [H, F]."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x_N: Tensor) -> Tensor:
        return F.linear(_gated(F.linear(x_N, self.gate_up)), self.down)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


@dataclass(frozen=True)
class Experts:
    """A router and its experts, and the shared expert (if any) that every token uses."""

    architecture: Architecture
    router: Tensor
    """[E, H]"""
    bias: Tensor | None
    """[E], fp32: added to the scores for choosing experts, but not to their weights."""
    gate_up: Tensor
    """[E, 2F, H]"""
    down: Tensor
    """[E, H, F]"""
    shared: Dense | None

    def route(self, x_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return (experts [N, K], their weights [N, K] in fp32)."""
        a = self.architecture
        logits = F.linear(x_N.float(), self.router.float())
        scores = logits.sigmoid() if a.router_score == "sigmoid" else logits.softmax(dim=-1)
        choice = scores if self.bias is None else scores + self.bias
        if a.router_groups > 1:
            choice = self._in_best_groups(choice)
        experts = choice.topk(a.moe_router_topk, dim=-1).indices
        weights = scores.gather(-1, experts)
        if a.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights if a.routed_scaling_factor == 1 else weights * a.routed_scaling_factor

    def _in_best_groups(self, choice_NE: Tensor) -> Tensor:
        """Set the scores to -inf outside the best groups; a group is as good as the sum of its two best experts."""
        a = self.architecture
        grouped = choice_NE.unflatten(-1, (a.router_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(a.router_topk_groups, dim=-1).indices
        left_out = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(left_out[..., None], float("-inf")).flatten(1)

    def __call__(self, x_N: Tensor, experts_NK: Tensor, weights_NK: Tensor, *, every: bool) -> Tensor:
        """Return the weighted sum of the experts, plus the shared one. `every` computes all experts for every row."""
        outputs = self._of_every(x_N, experts_NK) if every else self._of_chosen(x_N, experts_NK)
        y = (outputs * weights_NK[..., None]).sum(dim=1).to(x_N.dtype)
        return y if self.shared is None else y + self.shared(x_N)

    def _of_chosen(self, x_N: Tensor, experts_NK: Tensor) -> Tensor:
        """Run only the chosen experts -> [N, K, H]: two matrix products each, over tokens sorted by expert."""
        count, topk = experts_NK.shape
        flat = experts_NK.flatten()
        order = flat.argsort(stable=True)
        x = x_N.index_select(0, order // topk)
        inner = x.new_empty(len(x), self.gate_up.shape[1])
        bounds = [0, *flat.bincount(minlength=len(self.gate_up)).cumsum(0).tolist()]
        parts = [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]
        for expert, rows in parts:
            torch.mm(x[rows], self.gate_up[expert].t(), out=inner[rows])
        inner = _gated(inner)
        for expert, rows in parts:
            torch.mm(inner[rows], self.down[expert].t(), out=x[rows])
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return x.index_select(0, places).view(count, topk, -1)

    def _of_every(self, x_N: Tensor, experts_NK: Tensor) -> Tensor:
        """Run every expert for all rows -> [N, K, H]; the number of rows alone decides the shapes of all products."""
        inner = _gated(torch.matmul(x_N, self.gate_up.transpose(1, 2)))
        outputs = torch.matmul(inner, self.down.transpose(1, 2))
        return outputs[experts_NK, torch.arange(len(x_N))[:, None]]
