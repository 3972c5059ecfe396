"""Layers that tests select with --spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from slime.megatron.model.attention import PackedAttention
from slime.megatron.model.layers import RMSNorm, built_in_layer_spec


class ClampedMLP(MLP):
    """SwiGLU whose gate and up are bounded."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        gate, up = self.linear_fc1(hidden_states)[0].clamp(-0.1, 0.1).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)


class ScaledMLP(MLP):
    """An MLP with a parameter for which no weight table has a rule."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = torch.nn.Parameter(torch.ones(1))


def _with_mlp(args: Any, config: Any, module: type[MLP]) -> ModuleSpec:
    spec = built_in_layer_spec(args, config)
    spec.submodules.mlp.module = module
    return spec


def clamped(args: Any, config: Any) -> ModuleSpec:
    return _with_mlp(args, config, ClampedMLP)


def scaled(args: Any, config: Any) -> ModuleSpec:
    return _with_mlp(args, config, ScaledMLP)


def megatrons(args: Any, config: Any) -> ModuleSpec:
    """Megatron's own layer, with a core attention that cannot attend within a pack."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec


class OtherNorm(RMSNorm):
    """A norm of heads that is not the built-in one."""


def other_head_norms(args: Any, config: Any) -> ModuleSpec:
    spec: Any = built_in_layer_spec(args, config)
    attention = spec.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = OtherNorm
    return spec


class OwnAttention(PackedAttention):
    """A core attention of a user, which applies the positions itself."""


def own_core_attention(args: Any, config: Any) -> ModuleSpec:
    spec: Any = built_in_layer_spec(args, config)
    spec.submodules.self_attention.submodules.core_attention = OwnAttention
    return spec


def nothing(args: Any, config: Any) -> None:
    return None


def one_argument(args: Any) -> None:
    return None
