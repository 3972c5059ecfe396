"""The linear layers of all experts at once: a grouped matrix product on a GPU, or a loop over experts.

- Used by: `stacked_experts`, for both linear layers of its experts.
- Invariant: both forms compute the same function, and its gradients. An expert without tokens gets a gradient of zeros.
  The grouped form does not wait for the device: only the GPU knows how many tokens an expert has.

In bf16, gradients of weights are added to their fp32 buffers here. The loop adds sums that are not rounded. The grouped
product of torch returns bf16, so each micro-batch's gradient is rounded once before it is added.

Shapes: t tokens sorted by expert, E experts on this rank, I and O the channels of input and output.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slime.config import experts
from slime.megatron import device
from slime.megatron.model.main_gradients import add_product, added, main_gradient

logger = logging.getLogger(__name__)

GROUPED_ON = (9, 10)
"""The major compute capabilities with a kernel; on others torch would loop over the groups and wait for the device."""


def why_not_grouped(dtype: torch.dtype, channels: Sequence[int]) -> str | None:
    """Return the reason for which experts have to run one after the other here; None if there is none.

    Args:
        dtype: of their weights.
        channels: the channels of an expert's inputs and outputs on this rank.
    """
    reason = experts.why_not_grouped(on_cuda=device.on_cuda(), bf16=dtype == torch.bfloat16, channels=channels)
    if reason is None and torch.cuda.get_device_capability()[0] not in GROUPED_ON:
        return f"torch has no grouped matrix product for {torch.cuda.get_device_name()}"
    return reason


@cache
def warn_of_loop(reason: str) -> None:
    """Log once that --moe-grouped-gemm has no effect."""
    logger.warning("--moe-grouped-gemm has no effect, experts run one after the other: %s", reason)


@dataclass(frozen=True)
class Groups:
    """The tokens of each expert in a tensor of tokens that are sorted by expert.

    With 3 experts and counts [2, 0, 3], the ends are [2, 2, 5]: rows 0 and 1 belong to expert 0, rows 2 to 4 to
    expert 2.
    """

    counts: list[int] | None
    """The number of tokens of each expert, for the loop; None in the grouped form."""
    ends: Tensor | None
    """[E] int32 on the tokens' device: the end of each expert's rows, for the grouped form; None in the loop."""

    @classmethod
    def of(cls, tokens_E: Tensor, where: torch.device, *, grouped: bool) -> Groups:
        """Build them from the number of tokens of each expert, [E] on any device."""
        if not grouped:
            return cls(tokens_E.tolist(), None)
        return cls(None, tokens_E.to(where, non_blocking=True).cumsum(0).to(torch.int32))

    def products(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Multiply each expert's tokens [t, I] with its own matrix, weights [E, I, O]: [t, O]."""
        if self.counts is None:
            if not len(tokens):  # there is no block for a kernel
                return tokens.new_zeros(0, weights.size(2))
            return _grouped_mm(tokens, weights, self.ends)
        found = tokens.new_empty(len(tokens), weights.size(2))
        parts = zip(tokens.split(self.counts), weights, found.split(self.counts), strict=True)
        for part, weight, out in parts:
            torch.mm(part, weight, out=out)
        return found

    def weight_gradients(self, gradient: Tensor, tokens: Tensor) -> Tensor:
        """Return gradient^T tokens of each expert: [t, O] and [t, I] -> [E, O, I]."""
        if self.counts is None:
            assert self.ends is not None
            if not len(tokens):
                return tokens.new_zeros(len(self.ends), gradient.size(1), tokens.size(1))
            return _grouped_mm(gradient.t(), tokens, self.ends)
        found = tokens.new_empty(len(self.counts), gradient.size(1), tokens.size(1))
        for mine, part, out in zip(gradient.split(self.counts), tokens.split(self.counts), found, strict=True):
            torch.mm(mine.t(), part, out=out)
        return found

    def add_weight_gradients(self, main_grad: Tensor, gradient: Tensor, tokens: Tensor) -> None:
        """Add gradient^T tokens of each expert to the fp32 buffer, main_grad [E, O, I]."""
        if self.counts is None:
            main_grad.add_(self.weight_gradients(gradient, tokens))
            return
        parts = zip(main_grad, gradient.split(self.counts), tokens.split(self.counts), strict=True)
        for buffer, mine, part in parts:
            if len(part):
                add_product(buffer, mine, part)


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    product: Any = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
    return product(a, b, offs=ends)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.groups = weight, groups
        return groups.products(tokens, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        gradient, weight, groups = gradients[0].contiguous(), ctx.weight, ctx.groups
        of_tokens = groups.products(gradient, weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_tokens, None, None
        main_grad = main_gradient(weight)
        if main_grad is None:
            return of_tokens, groups.weight_gradients(gradient, tokens), None
        groups.add_weight_gradients(main_grad, gradient, tokens)
        return of_tokens, added(weight), None


def expert_linear(tokens: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Apply the linear layer of each token's expert: tokens [t, I] sorted by expert, weight [E, O, I] -> [t, O].

    The gradient of a bf16 weight in a data-parallel wrapper goes to its fp32 buffer.
    """
    return _ExpertLinear.apply(tokens, weight, groups)  # pyright: ignore[reportReturnType]
