"""PyTorch's Adam inside Megatron's optimizers, which expect that of TransformerEngine or Apex.

- Used by: `optimizer` installs the corrections before it builds, and turns the Adam that Megatron built into one that
  steps in one pass; `cpu_offload` builds on that step, and `save_load` saves and loads the state.
- Invariant: every parameter's state has a `step` tensor of its own, and after loading it has the saved value. A step in
  one pass gives the same numbers as PyTorch's fused step.

Where TransformerEngine or Apex is installed, Megatron uses their Adam, and nothing here is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from slime.megatron import device
from slime.megatron.compat import apply

if TYPE_CHECKING:
    from slime.megatron.model.kernels import triton_adamw

_Original = distrib_optimizer.DistributedOptimizer


class TorchDistributedOptimizer(_Original):
    """Megatron's optimizer adapted to torch Adam's per-parameter steps; Megatron expects one step for all."""

    def state_dict(self) -> dict[str, Any]:
        start_adam(self.optimizer)  # Megatron reads the step from the states, which do not exist before the first step
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Megatron gives one step tensor to all parameters. Each would advance it, and Adam's bias correction would be
        # wrong without an error.
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def install() -> None:
    """Make Megatron build TorchDistributedOptimizer. No-op if TransformerEngine or Apex is installed."""
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        apply.replace("megatron.core.optimizer", "DistributedOptimizer", TorchDistributedOptimizer)


class PlacedAdamW(torch.optim.AdamW):
    """An AdamW that decides itself where its state is kept."""

    def start(self) -> None:
        """Create the state; see `start_adam`."""
        raise NotImplementedError


def start_adam(adam: torch.optim.Optimizer) -> None:
    """Give every parameter without state the state with which Adam's first step would begin."""
    if isinstance(adam, PlacedAdamW):
        adam.start()
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                device = parameter.device if group["fused"] or group["capturable"] else "cpu"
                adam.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }


class OnePassAdamW(torch.optim.AdamW):
    """AdamW in one pass per weight over fp32 main weights of a bf16 model; `step_in_one_pass` turns an AdamW into one.

    State, settings, `grad_scale` and `found_inf` have the meaning of torch.optim.AdamW(fused=True), so the code around
    it is unchanged. After a step the model's weights are the main weights, rounded; without this class that takes a
    copy pass over all of them.
    """

    model_of: dict[Tensor, Tensor]
    """The model's memory that gets the rounded value of each main weight."""
    together: dict[int, triton_adamw.Weights]
    """The launches that step all weights of a group, by the group's number."""
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from slime.megatron.model.kernels import triton_adamw

        start_adam(self)
        for number, group in enumerate(self.param_groups):
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            counted = count_steps(self, weights, group)
            if number not in self.together:
                self.together[number] = triton_adamw.Weights()
            self.together[number].step([self._memory(weight) for weight in weights], counted)

    def _memory(self, weight: Tensor) -> triton_adamw.Memory:
        from slime.megatron.model.kernels import triton_adamw

        assert weight.grad is not None
        state, model = self.state[weight], self.model_of.get(weight)
        return triton_adamw.Memory(
            gradient=weight.grad,
            weight=weight,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            model=model,
        )


@dataclass(frozen=True)
class Counted:
    """The inputs of a step that the weights of a group share."""

    corrections: Tensor
    """[n, 2] float32, a row for each weight: 1 / (1 - beta1^step), 1 / sqrt(1 - beta2^step)."""
    scale: Tensor
    """[] by which gradients are divided."""
    skip: Tensor
    """[] nothing changes unless it is 0."""
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def count_steps(adam: Any, weights: Sequence[Tensor], group: dict[str, Any]) -> Counted:
    """Count one more step of these weights of a group, unless the step is to be skipped."""
    steps: list[Tensor] = [adam.state[weight]["step"] for weight in weights]
    scale = torch.ones_like(steps[0]) if adam.grad_scale is None else adam.grad_scale
    skip = torch.zeros_like(steps[0]) if adam.found_inf is None else adam.found_inf
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sub_(steps, [skip] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
    settings = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
    return Counted(bias_corrections(torch.stack(steps), group["betas"]), scale, skip, **settings)


def bias_corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return [n, 2] float32 for n steps: 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step), computed in float64."""
    steps = steps.double()
    first, second = (1.0 - torch.pow(beta, steps) for beta in betas)
    return torch.stack([first.reciprocal(), second.rsqrt()], dim=1).float()


def step_in_one_pass(part: MegatronOptimizer) -> bool:
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
    made: Any = adam
    made.model_of, made.together = dict(model_memory(part)), {}
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
