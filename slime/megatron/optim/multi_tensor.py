"""Megatron's passes over all weights and gradients on a GPU, fused as with TransformerEngine or Apex.

- Used by: `build` calls `fuse_weight_gradients`; `optimizer` installs the rest before it builds.
- Invariant: sums, norm, clipping and copies give the results of Megatron's own. On a CPU nothing is replaced.

Without those packages Megatron would make each weight's gradient in bf16 and add it to the buffer in a second pass, run
the other operations tensor by tensor, and wait for the GPU at each tensor's norm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.tensor_parallel import layers as mcore_layers
from torch import Tensor

from slime.megatron import device
from slime.megatron.compat import apply

logger = logging.getLogger(__name__)


class WeightGradients:
    """Replaces Apex's extension of that name: a matrix product adds its sums to the fp32 gradient unrounded."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add a product in place: main_grad [out, in] float32 += grad_output [B, out]^T total_input [B, in]."""
        torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=torch.float32, out=main_grad)


def fuse_weight_gradients() -> bool:
    """Make Megatron's linear layers add their weights' gradients to the buffer; return whether they do.

    This needs a GPU and a torch whose matrix product adds to float32 in place. It is tried once, on ones: 16 products
    of 1 added to 3 make 19, without rounding.
    """
    if not device.on_cuda():
        return False
    if mcore_layers._grad_accum_fusion_available:  # Apex's, or ours from an earlier call
        return True
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device.device())
    total = torch.full((16, 16), 3.0, device=ones.device)
    try:
        WeightGradients.wgrad_gemm_accum_fp32(ones, ones, total)
    except (RuntimeError, TypeError) as error:
        logger.warning("weight gradients are added in a separate pass, which costs time: %s", error)
        return False
    if not bool((total == 19.0).all()):
        logger.warning("weight gradients are added in a separate pass: the addmm of this torch does not add in place")
        return False
    apply.define("megatron.core.tensor_parallel.layers", "fused_weight_gradient_mlp_cuda", WeightGradients)
    apply.replace("megatron.core.tensor_parallel.layers", "_grad_accum_fusion_available", True)
    return True


def _norm(chunk_size: int, noop_flag: Tensor, lists: Sequence[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Return [1]: the norm over all tensors of the one list."""
    [tensors] = lists
    norms: Any = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).norm().reshape(1), None


def _scale(chunk_size: int, noop_flag: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    """Scale in place: Megatron clips with one list as both source and target."""
    source, target = lists
    assert source is target
    torch._foreach_mul_(target, factor)  # pyright: ignore[reportPrivateImportUsage]


def _copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """Copy `this` to `that`, in the dtype of `that`."""
    if this and this[0].device != that[0].device:  # main weights are in host memory
        for source, target in zip(this, that, strict=True):
            target.copy_(source)
    elif this:
        torch._foreach_copy_(that, this)  # pyright: ignore[reportPrivateImportUsage]


def gradient_norm(parts: Sequence[MegatronOptimizer]) -> Tensor:
    """Return [] the norm of all ranks' gradients, counted as Megatron does; nothing waits for it."""
    squares: list[Tensor] = []
    for part in parts:
        gradients = cast(Any, part).get_main_grads_for_grad_norm()
        norm = _norm(0, torch.empty(0), [gradients])[0] if gradients else torch.zeros(1, device=device.device())
        square = norm.square()
        dist.all_reduce(square, group=cast(Any, part).get_grad_stats_parallel_group())
        squares.append(square)
    return torch.cat(squares).sum().sqrt()


@contextmanager
def scaled_as_read(adams: Sequence[torch.optim.Optimizer], scale: Tensor, skip: Tensor) -> Iterator[None]:
    """Inside, PyTorch's fused Adams divide their gradients by `scale` in the pass that reads them.

    Args:
        scale: [] float32 on their device; nothing waits for it.
        skip: [] float32 on their device; if it is 1, a step changes nothing.
    """
    for adam in cast(Any, adams):
        adam.grad_scale, adam.found_inf = scale, skip
    try:
        yield
    finally:
        for adam in cast(Any, adams):
            del adam.grad_scale, adam.found_inf


def takes_scale(optimizer: object) -> bool:
    """True for a fused Adam of PyTorch on a GPU, even without parameters: all ranks have to take the same branch."""
    return (
        device.on_cuda()
        and isinstance(optimizer, torch.optim.Adam)
        and all(group["fused"] for group in optimizer.param_groups)
    )


def install() -> None:
    """Replace Megatron's functions. No-op on a CPU, and if TransformerEngine or Apex is installed."""
    if not device.on_cuda() or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    apply.replace("megatron.core.optimizer.clip_grads", "l2_norm_impl", _norm)
    apply.replace("megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl", _scale)
    apply.replace("megatron.core.optimizer.optimizer", "_multi_tensor_copy_this_to_that", _copy)
