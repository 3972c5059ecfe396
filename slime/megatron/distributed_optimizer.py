"""Megatron's distributed optimizer over PyTorch's own Adam: four corrections where nothing else is installed.

Path: `optimizer` installs this before it builds; `checkpoint` saves and loads what it builds. Invariant: every
parameter's state has a `step` of its own, and after loading it is the saved one.
"""

from __future__ import annotations

from typing import Any

import megatron.core.optimizer as mcore_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from slime.megatron.device import replace_name, require_names

_Original = distrib_optimizer.DistributedOptimizer


class TorchDistributedOptimizer(_Original):
    """What Megatron writes for Adams that keep one step for all parameters, for one that keeps a step for each."""

    def state_dict(self) -> dict[str, Any]:
        start_adam(self.optimizer)  # Megatron looks up the step in the states, and before the first step there are none
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Megatron gives one step tensor to all; each would advance it, and Adam's bias correction be off in silence
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Each buffer's state with every bucket where it stands in the buffer.

        Megatron takes the padding at buckets' ends out, and then looks parameters up by their places in the buffer,
        padding counted: behind a bucket whose size is no multiple of its alignment it would save the wrong numbers.
        """
        state: Any = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is None:  # not the rank that writes
            return None
        for number, buffer in enumerate(self.buffers):
            for tensors in state[number].values():
                for name, packed in tensors.items():
                    if name != "numel_unpadded":
                        tensors[name] = _in_place(packed, buffer)
        return state

    @torch.no_grad()  # of fp32 weights these are views, which autograd guards
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][place]
        for name, there in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":  # no tensor of the checkpoint: `load_state_dict` has set it
                there.copy_(tensors[name])


def _in_place(packed: Tensor, buffer: Any) -> Tensor:
    """Buckets that lie one behind the other, moved to their offsets in the buffer."""
    placed, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        placed[bucket.offset : bucket.offset + size] = packed[start : start + size]
        start += size
    return placed


def install() -> None:
    """Have Megatron build this one. No-op where TransformerEngine or Apex bring their Adam."""
    require_names(distrib_optimizer, "HAVE_APEX_OR_TE")
    require_names(
        _Original,
        "state_dict",
        "load_state_dict",
        "get_parameter_state_dp_zero",
        "_set_main_param_and_optimizer_states",
    )
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        replace_name(mcore_optimizer, "DistributedOptimizer", TorchDistributedOptimizer)


class PlacedAdamW(torch.optim.AdamW):
    """An AdamW that says itself where its state stands."""

    def start(self) -> None:
        """`start_adam`."""
        raise NotImplementedError


def start_adam(adam: torch.optim.Optimizer) -> None:
    """Give every parameter that has none the state which Adam's first step would begin with."""
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
