"""GLM-4 dense (HF `Glm4ForCausalLM`): norms before and after both sub-layers, one fused gate-up projection in HF."""

from __future__ import annotations

from slime.core.architecture import Architecture
from slime.models.decoder import HF_LAYER, MEGATRON_LAYER, attention, norm, row_parallel, with_embeddings
from slime.models.mapping import GateUp, Rule


def rules(architecture: Architecture) -> list[Rule]:
    """Return the weight rules of GLM-4."""
    return with_embeddings(
        architecture,
        [
            norm("input_layernorm", "input_layernorm"),
            *attention(architecture),
            norm("post_self_attn_layernorm", "post_self_attn_layernorm"),
            # HF names the norm by its position (after attention), Megatron by what it feeds (the MLP).
            norm("pre_mlp_layernorm", "post_attention_layernorm"),
            GateUp(f"{MEGATRON_LAYER}mlp.linear_fc1.weight", (f"{HF_LAYER}mlp.gate_up_proj.weight",)),
            row_parallel("mlp.linear_fc2", "mlp.down_proj"),
            norm("post_mlp_layernorm", "post_mlp_layernorm"),
        ],
    )
