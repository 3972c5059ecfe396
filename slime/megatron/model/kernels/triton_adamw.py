"""AdamW on a GPU in one pass: it reads gradient, weight and moments once, and writes the model's bf16 copy, too.

- Used by: `optim.adam`, for each weight.
- Invariant: everything between load and store is float32. Decay and update of a weight are rounded once, together; the
  model's copy is the new weight, rounded.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit(do_not_specialize=["place"])
def _adamw(
    gradient_ptr,
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    model_ptr,
    corrections_ptr,
    place,
    scale_ptr,
    skip_ptr,
    size,
    lr,
    decay,
    share1,
    share2,
    eps,
    WITH_MODEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    gradient = tl.load(gradient_ptr + at, mask=here, other=0.0)
    weight = tl.load(weight_ptr + at, mask=here, other=0.0)
    exp_avg = tl.load(exp_avg_ptr + at, mask=here, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=here, other=0.0)
    correction1 = tl.load(corrections_ptr + 2 * place)
    correction2 = tl.load(corrections_ptr + 2 * place + 1)
    gradient = gradient / tl.load(scale_ptr)
    # written as a step towards the new value, so that the rounding of 1 - beta does not add up over many steps
    exp_avg += share1 * (gradient - exp_avg)
    exp_avg_sq += share2 * (gradient * gradient - exp_avg_sq)
    update = lr * correction1 * exp_avg / (tl.sqrt(exp_avg_sq) * correction2 + eps)
    weight -= decay * weight + update
    there = at < tl.where(tl.load(skip_ptr) == 0.0, size, 0)  # only the stores wait for `skip`
    tl.store(weight_ptr + at, weight, mask=there)
    tl.store(exp_avg_ptr + at, exp_avg, mask=there)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=there)
    if WITH_MODEL:
        tl.store(model_ptr + at, weight.to(model_ptr.dtype.element_ty), mask=there)


def adamw(
    gradient: Tensor,
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    model: Tensor | None,
    corrections: Tensor,
    place: int,
    *,
    scale: Tensor,
    skip: Tensor,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take one step of one weight, in place. All tensors are contiguous float32 of one size; `model` has its own dtype.

    Args:
        model: gets the new weight; None if there is no copy.
        corrections: [n, 2] float32, whose row `place` is used: 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step).
        scale: [] by which the gradient is divided.
        skip: [] nothing changes unless it is 0.
    """
    for tensor in (gradient, weight, exp_avg, exp_avg_sq, *([] if model is None else [model])):
        assert tensor.is_contiguous() and tensor.numel() == weight.numel()
    if not weight.numel():
        return
    _adamw[(triton.cdiv(weight.numel(), BLOCK),)](
        gradient,
        weight,
        exp_avg,
        exp_avg_sq,
        weight if model is None else model,
        corrections,
        place,
        scale,
        skip,
        weight.numel(),
        float(lr),
        float(lr * weight_decay),
        1.0 - betas[0],
        1.0 - betas[1],
        float(eps),
        WITH_MODEL=model is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
