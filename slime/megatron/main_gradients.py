"""Gradients of the vocabulary's tables, added to their fp32 buffers as they come, without one of the whole table.

Path: `logprobs` adds the output layer's here, and `optimizer` has the embedding do so. Invariant: a bf16 weight of a
data-parallel wrapper gets every part of its gradient in `main_grad`, and the wrapper is told that it has it, as
Megatron's linear layers tell it. Otherwise each micro-batch would make a bf16 gradient of the table, mostly zeros for
an embedding, and add that in another pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers as mcore_layers
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor


def main_gradient(weight: Any) -> Tensor | None:
    """The fp32 buffer of a bf16 weight that trains; None: its gradient is PyTorch's to sum."""
    return weight.main_grad if weight.dtype == torch.bfloat16 and hasattr(weight, "main_grad") else None


def added(weight: Any) -> Tensor:
    """Tell the wrapper so; what autograd gets for the gradient, which the wrapper asks for and does not read."""
    weight.grad_added_to_main_grad = True
    # of a table that is tied within a stage Megatron adds it all the same
    return torch.zeros_like(weight) if _is_tied_here(weight) else torch.empty_like(weight)


def _is_tied_here(weight: Any) -> bool:
    return getattr(weight, "zero_out_wgrad", False)


def add_product(main_grad: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """main_grad [N, K] float32 += gradient [T, N]^T inputs [T, K]."""
    if not main_grad.is_cuda:
        main_grad.add_(gradient.t() @ inputs)
    elif mcore_layers._grad_accum_fusion_available:  # tried, by `multi_tensor`
        product: Any = mcore_layers.fused_weight_gradient_mlp_cuda  # pyright: ignore[reportAttributeAccessIssue]
        product.wgrad_gemm_accum_fp32(inputs, gradient, main_grad)
    else:
        main_grad.add_(torch.mm(gradient.t(), inputs, out_dtype=torch.float32))


class _Rows(torch.autograd.Function):
    """weight [V, H], ids [...] -> [..., H]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        main_grad = main_gradient(ctx.weight)
        assert main_grad is not None
        rows = gradients[0].reshape(-1, main_grad.size(1)).to(main_grad.dtype)
        # sorts the ids: no atomics, the same bits again. It does not ask, and wait, whether they are in range: the
        # lookup has
        add: Any = torch._index_put_impl_  # pyright: ignore[reportPrivateImportUsage]
        add(main_grad, (ids.flatten(),), rows, accumulate=True, unsafe=True)
        # the output layer's gradient stands for both
        return None if _is_tied_here(ctx.weight) else added(ctx.weight), None


class WordEmbeddings(VocabParallelEmbedding):
    """Made of one that exists, by `install`."""

    def forward(self, input_: Tensor) -> Tensor:
        if main_gradient(self.weight) is None or not torch.is_grad_enabled():
            return super().forward(input_)
        if self.num_embeddings_per_partition < self.num_embeddings:
            ids = input_ - self.vocab_start_index
            here = (ids >= 0) & (ids < self.num_embeddings_per_partition)
            rows: Any = _Rows.apply(self.weight, torch.where(here, ids, 0))
            rows = torch.where(here[..., None], rows, 0.0)
        else:
            rows = _Rows.apply(self.weight, input_)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


def install(model: torch.nn.Module) -> None:
    """Have the embedding of `model`, where this stage has it, add its gradient itself."""
    for module in model.modules():
        if type(module) is VocabParallelEmbedding:
            module.__class__ = WordEmbeddings
