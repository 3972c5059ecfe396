"""The spec of a transformer layer: Megatron's local modules, with our norm, our packed attention and our MLP.

- Used by: `build`, which stacks these into the model.
- Invariant: nothing here needs TransformerEngine or Apex.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from slime.config.args import Args
from slime.core.plugins import hook_function, hook_path
from slime.megatron.model.attention import PackedAttention
from slime.megatron.model.kernels import swiglu
from slime.megatron.model.layer import PackedLayer, PackedSelfAttention, RMSNorm
from slime.megatron.model.moe import ExpertRouter, ExpertsLayer
from slime.megatron.model.stacked_experts import StackedExperts


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


class SandwichLayer(PackedLayer):
    """A transformer layer with norms after attention and MLP as well as before them."""

    def __init__(self, config: TransformerConfig, submodules: SandwichLayerSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)

        def norm() -> RMSNorm:
            return RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

        if submodules.norm_after_attention:
            self.post_self_attn_layernorm = norm()
        if submodules.norm_after_mlp:
            self.post_mlp_layernorm = norm()


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
        spec.module, parts.mlp.module = PackedLayer, GatedMLP
    assert isinstance(parts.self_attention, ModuleSpec)
    attention = parts.self_attention.submodules
    assert isinstance(attention, SelfAttentionSubmodules)
    parts.self_attention.module = PackedSelfAttention
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
