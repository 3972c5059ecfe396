"""Megatron's passes over all weights on a GPU, each as a few kernels over lists of tensors.

Path: `optimizer` installs this before it builds. Invariant: norm, clipping and the copy to the model's weights are
Megatron's own; without TransformerEngine and Apex it would take them tensor by tensor, and wait for the GPU at each
tensor's norm. A CPU keeps Megatron's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mcore_optimizer
from torch import Tensor

from slime.megatron import device


def _norm(chunk_size: int, noop_flag: Tensor, lists: Sequence[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """[1]: the norm over all tensors of the one list."""
    [tensors] = lists
    return torch.stack(torch._foreach_norm(tensors)).norm().reshape(1), None  # pyright: ignore[reportArgumentType]


def _scale(chunk_size: int, noop_flag: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    """In place: Megatron clips with the same list for source and target."""
    source, target = lists
    assert source is target
    torch._foreach_mul_(target, factor)


def _copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """This to that, in that one's dtype."""
    if this:
        torch._foreach_copy_(that, this)


def install() -> None:
    """Put them in the place of Megatron's. No-op on a CPU, and where TransformerEngine or Apex bring theirs."""
    if not device.on_cuda() or distrib_optimizer.HAVE_APEX_OR_TE:
        return
    device.replace_name(clip_grads, "l2_norm_impl", _norm)
    device.replace_name(clip_grads, "multi_tensor_scale_impl", _scale)
    device.replace_name(mcore_optimizer, "_multi_tensor_copy_this_to_that", _copy)
