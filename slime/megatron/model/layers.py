"""One transformer layer from Megatron's local modules, with our norm and our packed attention.

- Used by: `build`, which stacks these into the model.
- Invariant: nothing here needs TransformerEngine or Apex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from slime.config.args import Args
from slime.core.plugins import hook_function, hook_path
from slime.megatron.model.attention import PackedAttention
from slime.megatron.model.kernels import rms_norm, swiglu
from slime.megatron.model.moe import ExpertRouter, ExpertsLayer
from slime.megatron.model.stacked_experts import StackedExperts


class RMSNorm(torch.nn.Module):
    """RMSNorm with the mark by which Megatron sums its gradient over tensor-parallel ranks (sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(MLP):
    """Megatron's MLP with SwiGLU as one operation; its own adds an offset of 0 in a separate pass."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> Any:
        assert per_token_scale is None, "for experts"
        gate_up, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up if bias is None else gate_up + bias))


@dataclass
class SandwichLayerSubmodules(TransformerLayerSubmodules):
    """The sub-layers whose outputs are normed before they join the residual stream (GLM-4)."""

    norm_after_attention: bool = False
    norm_after_mlp: bool = False


class SandwichLayer(TransformerLayer):
    """A transformer layer with norms after attention and MLP as well as before them."""

    def __init__(self, config: TransformerConfig, submodules: SandwichLayerSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)

        def norm() -> RMSNorm:
            return RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

        if submodules.norm_after_attention:
            self.post_self_attn_layernorm = norm()
            self.self_attn_bda = _normed(self.self_attn_bda, lambda: self.post_self_attn_layernorm)
        if submodules.norm_after_mlp:
            self.post_mlp_layernorm = norm()
            self.mlp_bda = _normed(self.mlp_bda, lambda: self.post_mlp_layernorm)


def _normed(bias_dropout_add: Callable[..., Any], norm: Callable[[], RMSNorm]) -> Callable[..., Any]:
    """Wrap Megatron's bias-dropout-add so that it norms the sub-layer's output first."""

    def outer(training: bool, fused: bool) -> Callable[..., Tensor]:
        def inner(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            output = norm()(output if bias is None else output + bias)
            return bias_dropout_add(training, fused)((output, None), residual, dropout)

        return inner

    return outer


def layer_spec(args: Args, config: TransformerConfig, layer: int = 0) -> ModuleSpec:
    """Return the spec of layer number `layer`: --spec's with packed attention in it, or the built-in one.

    Raises:
        ValueError: --spec's function does not return a layer.
    """
    path = hook_path(args.spec)
    if path is None:
        return built_in_layer_spec(args, config, layer)
    spec = hook_function("spec", path)(args, config)
    parts = spec.submodules if isinstance(spec, ModuleSpec) else None
    attention = parts.self_attention if isinstance(parts, TransformerLayerSubmodules) else None
    inner = attention.submodules if isinstance(attention, ModuleSpec) else None
    if not isinstance(inner, SelfAttentionSubmodules):
        raise ValueError(
            f"--spec {' '.join(args.spec)}: it returned {spec!r}; it has to return a ModuleSpec with "
            "TransformerLayerSubmodules whose self_attention has SelfAttentionSubmodules: change a copy of what "
            "slime.megatron.model.layers.built_in_layer_spec(args, config) returns"
        )
    if _is_megatrons(inner.core_attention):
        inner.core_attention = PackedAttention
    return spec


def _is_megatrons(core_attention: object) -> bool:
    """True for Megatron's own modules, which get no rotary positions here or cannot attend within a pack."""
    module = core_attention.module if isinstance(core_attention, ModuleSpec) else core_attention
    return isinstance(module, type) and module.__module__.startswith("megatron.")


def built_in_layer_spec(args: Args, config: TransformerConfig, layer: int = 0) -> ModuleSpec:
    """Return one layer from Megatron's local modules with our norm and our packed attention, new at each call."""
    arch = args.resolved.architecture
    spec = get_gpt_layer_local_spec(
        num_experts=arch.num_experts if arch.is_moe_layer(layer) else None,
        qk_layernorm=arch.qk_layernorm,
        normalization="RMSNorm",
    )
    parts = spec.submodules
    assert isinstance(parts, TransformerLayerSubmodules)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    assert isinstance(parts.mlp, ModuleSpec)
    if arch.is_moe_layer(layer):
        assert parts.mlp.module is MoELayer and isinstance(parts.mlp.submodules, MoESubmodules)
        assert isinstance(parts.mlp.submodules.experts, ModuleSpec)
        spec.module = ExpertsLayer
        parts.mlp.submodules.experts.module, parts.mlp.submodules.router = StackedExperts, ExpertRouter
    else:
        assert parts.mlp.module is MLP
        parts.mlp.module = GatedMLP
    assert isinstance(parts.self_attention, ModuleSpec)
    attention = parts.self_attention.submodules
    assert isinstance(attention, SelfAttentionSubmodules)
    attention.core_attention = PackedAttention
    if arch.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if arch.post_self_attn_layernorm or arch.post_mlp_layernorm:
        spec.module = SandwichLayer
        spec.submodules = SandwichLayerSubmodules(
            **{field.name: getattr(parts, field.name) for field in fields(parts)},
            norm_after_attention=arch.post_self_attn_layernorm,
            norm_after_mlp=arch.post_mlp_layernorm,
        )
    return spec
