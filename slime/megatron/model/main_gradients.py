"""Gradients of the vocabulary tables, added directly to their fp32 buffers without a gradient of the whole table.

- Used by: `logprobs` adds the output layer's gradient here; `optimizer` installs the embedding that does the same.
- Invariant: a bf16 weight inside a data-parallel wrapper gets every part of its gradient in `main_grad`, and is marked
  so that the wrapper does not add it again, as Megatron's linear layers do.

Without this, each micro-batch would make a bf16 gradient of the whole table (mostly zeros for an embedding) and add it
to the buffer in a second pass.

Shapes: B tokens, V rows of the table, H hidden.
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

from slime.megatron.compat import apply


def main_gradient(weight: Any) -> Tensor | None:
    """Return the fp32 gradient buffer of a bf16 weight that trains; None if PyTorch sums its gradient."""
    return weight.main_grad if weight.dtype == torch.bfloat16 and hasattr(weight, "main_grad") else None


def added(weight: Any) -> Tensor:
    """Mark the weight's gradient as added, and return a dummy: the wrapper requires one but does not read it."""
    weight.grad_added_to_main_grad = True
    # if the table is tied within a stage, Megatron does add the dummy, so it must be zeros
    return torch.zeros_like(weight) if _is_tied_here(weight) else torch.empty_like(weight)


def _is_tied_here(weight: Any) -> bool:
    return getattr(weight, "zero_out_wgrad", False)


def add_product(main_grad: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add a product to the buffer: main_grad [V, H] float32 += gradient [B, V]^T inputs [B, H]."""
    if not main_grad.is_cuda:
        main_grad.add_(gradient.t() @ inputs)
    elif mcore_layers._grad_accum_fusion_available:  # `multi_tensor` has tried it
        product: Any = mcore_layers.fused_weight_gradient_mlp_cuda  # pyright: ignore[reportAttributeAccessIssue]
        product.wgrad_gemm_accum_fp32(inputs, gradient, main_grad)
    else:
        main_grad.add_(torch.mm(gradient.t(), inputs, out_dtype=torch.float32))


class _Rows(torch.autograd.Function):
    """Embedding lookup: weight [V, H], ids [...] -> [..., H]."""

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
        # This sorts the ids and uses no atomics, so the same inputs give the same bits. `unsafe` skips the range check,
        # which would wait for the device; the lookup has checked the ids already.
        add: Any = torch._index_put_impl_  # pyright: ignore[reportPrivateImportUsage]
        add(main_grad, (ids.flatten(),), rows, accumulate=True, unsafe=True)
        # if the table is tied, the output layer marks the gradient for both
        return None if _is_tied_here(ctx.weight) else added(ctx.weight), None


class WordEmbeddings(VocabParallelEmbedding):
    """An embedding that adds its gradient to the buffer itself; `install` turns an existing embedding into one."""

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
    """Make the embedding of `model`, if this stage has one, add its gradient itself."""
    for module in model.modules():
        if type(module) is VocabParallelEmbedding:
            apply.change_class(module, WordEmbeddings)
