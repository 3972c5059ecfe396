"""PyTorch's AdamW over fp32 main weights of a bf16 model on a GPU, writing the model's weights in the same pass.

- Used by: `optimizer` turns the Adam that Megatron built into this class; `step` takes steps with it.
- Invariant: state, settings, `grad_scale` and `found_inf` have the meaning of torch.optim.AdamW(fused=True), so the
  code around it is unchanged. After a step the model's weights are the main weights, rounded; without this class that
  takes a copy pass over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from slime.megatron import device
from slime.megatron.compat import apply
from slime.megatron.optim.distributed_optimizer import start_adam


class OnePassAdamW(torch.optim.AdamW):
    """AdamW in one pass per weight; `install` turns an existing AdamW into one."""

    model_of: dict[Tensor, Tensor]
    """The model's memory that gets the rounded value of each main weight."""
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        start_adam(self)
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            counted = count_steps(self, weights, group)
            for place, weight in enumerate(weights):
                assert weight.grad is not None
                state = self.state[weight]
                moments = [state["exp_avg"], state["exp_avg_sq"]]
                pass_over(group, weight.grad, weight, moments, self.model_of.get(weight), counted, place)


@dataclass(frozen=True)
class Counted:
    """The inputs of `triton_adamw.adamw` that the weights of a group share."""

    corrections: Tensor
    scale: Tensor
    skip: Tensor


def count_steps(adam: Any, weights: Sequence[Tensor], group: dict[str, Any]) -> Counted:
    """Count one more step of these weights of a group, unless the step is to be skipped."""
    steps: list[Tensor] = [adam.state[weight]["step"] for weight in weights]
    scale = torch.ones_like(steps[0]) if adam.grad_scale is None else adam.grad_scale
    skip = torch.zeros_like(steps[0]) if adam.found_inf is None else adam.found_inf
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sub_(steps, [skip] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
    return Counted(bias_corrections(torch.stack(steps), group["betas"]), scale, skip)


def pass_over(
    group: dict[str, Any],
    gradient: Tensor,
    weight: Tensor,
    moments: Sequence[Tensor],
    model: Tensor | None,
    counted: Counted,
    place: int,
) -> None:
    """Take one step of one weight of a group, or of a part of it; `place` is its index among the counted weights."""
    from slime.megatron.model.kernels.triton_adamw import adamw

    exp_avg, exp_avg_sq = moments
    adamw(
        gradient,
        weight,
        exp_avg,
        exp_avg_sq,
        model,
        counted.corrections,
        place,
        scale=counted.scale,
        skip=counted.skip,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        betas=group["betas"],
        eps=group["eps"],
    )


def bias_corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return [n, 2] float32 for n steps: 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), computed in float64."""
    steps = steps.double()
    first, second = (1.0 - torch.pow(beta, steps) for beta in betas)
    return torch.stack([first.reciprocal(), second.rsqrt()], dim=1).float()


def install(part: MegatronOptimizer) -> bool:
    """Make `part` step in one pass; return whether it does: only on CUDA, for AdamW over a bf16 model."""
    adam = part.optimizer
    if not device.on_cuda() or type(adam) is not torch.optim.AdamW:
        return False
    if type(part) is not Float16OptimizerWithFloat16Params and not isinstance(part, DistributedOptimizer):
        return False
    weights = [weight for group in adam.param_groups for weight in group["params"]]
    plain = all(group["fused"] and not group["amsgrad"] and not group["maximize"] for group in adam.param_groups)
    if not plain or not all(w.is_cuda and w.dtype == torch.float32 and w.is_contiguous() for w in weights):
        return False
    apply.change_class(adam, OnePassAdamW)
    adam.model_of = dict(model_memory(part))  # pyright: ignore[reportAttributeAccessIssue]
    apply.replace_on(part, "_copy_main_params_to_model_params", lambda: None)  # the step has written them
    return True


def model_memory(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each fp32 main weight with the model's memory to which Megatron would copy it."""
    if not isinstance(part, DistributedOptimizer):
        for mains, models in zip(part.fp32_from_float16_groups, part.float16_groups, strict=True):
            yield from zip(mains, models, strict=True)
        return
    for mains, models in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True):
        for main, model in zip(mains, models, strict=True):
            span = part._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            buffer, _, bucket = part.model_param_gbuf_map[model]
            yield main, part.buffers[buffer].buckets[bucket].param_data.view(-1)[span.start : span.end]
