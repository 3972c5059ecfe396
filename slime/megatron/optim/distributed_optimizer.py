"""Four corrections that let Megatron's distributed optimizer work with PyTorch's own Adam.

- Used by: `optimizer` installs this before it builds; `save_load` saves and loads what it builds.
- Invariant: every parameter's state has a `step` tensor of its own, and after loading it has the saved value.

Where TransformerEngine or Apex is installed, Megatron uses their Adam, and nothing here is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from slime.megatron.compat import apply

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

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Return each buffer's state with every bucket at its offset in the buffer.

        Megatron removes the padding at the end of each bucket, and then looks parameters up by their offsets in the
        buffer, which count the padding. For example, after a bucket of 6 entries padded to 8 all parameters are off by
        2, and Megatron would save the wrong numbers for them.
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

    @torch.no_grad()  # fp32 main weights are views, which autograd does not let us write to
    def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][place]
        for name, there in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":  # not a tensor of the checkpoint: `load_state_dict` has set it
                there.copy_(tensors[name])


def _in_place(packed: Tensor, buffer: Any) -> Tensor:
    """Move buckets that lie one after the other to their offsets in the buffer."""
    placed, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        placed[bucket.offset : bucket.offset + size] = packed[start : start + size]
        start += size
    return placed


def install() -> None:
    """Make Megatron build this class. No-op if TransformerEngine or Apex is installed."""
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
