"""The weight rules that dense decoders share, driven by the Architecture's fields.

- Used by: the family files, which add their own names.
- Invariant: rules are listed in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from slime.core.architecture import Architecture
from slime.models.mapping import QKV, GateUp, Rename, Rule, Vocabulary

MEGATRON_LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


def norm(megatron: str, hf: str) -> Rename:
    """Return the rule for a norm of one layer, which every rank holds whole."""
    return Rename(f"{MEGATRON_LAYER}{megatron}.weight", (f"{HF_LAYER}{hf}.weight",))


def row_parallel(megatron: str, hf: str) -> Rename:
    """Return the rule for a linear layer whose input dimension is cut by tensor parallelism."""
    return Rename(f"{MEGATRON_LAYER}{megatron}.weight", (f"{HF_LAYER}{hf}.weight",), axis=1)


def attention(architecture: Architecture) -> list[Rule]:
    """Return the rules for the self-attention of one layer, without the norms around it."""
    kinds = ("weight", "bias") if architecture.add_qkv_bias else ("weight",)
    rules: list[Rule] = [
        QKV(
            f"{MEGATRON_LAYER}self_attention.linear_qkv.{kind}",
            tuple(f"{HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv"),
            architecture.num_query_groups,
            architecture.num_attention_heads,
            architecture.kv_channels,
        )
        for kind in kinds
    ]
    if architecture.qk_layernorm:
        rules += [norm(f"self_attention.{x}_layernorm", f"self_attn.{x}_norm") for x in "qk"]
    return [*rules, row_parallel("self_attention.linear_proj", "self_attn.o_proj")]


def pre_norm(architecture: Architecture) -> list[Rule]:
    """Return the rules of Llama-like decoders: norms before attention and MLP, separate gate and up weights in HF.

    The MLP may be a mixture of experts.
    """
    return with_embeddings(
        architecture,
        [
            norm("input_layernorm", "input_layernorm"),
            *attention(architecture),
            # HF names the norm by its position (after attention), Megatron by what it feeds (the MLP).
            norm("pre_mlp_layernorm", "post_attention_layernorm"),
            *dense_or_experts(architecture),
        ],
    )


def gated_mlp(megatron: str, hf: str, layers: range, num_experts: int = 0) -> list[Rule]:
    """Return the rules for a gated MLP in each of these layers; with `num_experts`, for each expert's MLP."""
    gate_up = tuple(f"{HF_LAYER}{hf}.{half}_proj.weight" for half in ("gate", "up"))
    fc1, fc2 = (f"{MEGATRON_LAYER}{megatron}.linear_{fc}.weight" for fc in ("fc1", "fc2"))
    down = (f"{HF_LAYER}{hf}.down_proj.weight",)
    return [
        GateUp(fc1, gate_up, layers=layers, num_experts=num_experts),
        Rename(fc2, down, 1, layers=layers, num_experts=num_experts),
    ]


def dense_or_experts(architecture: Architecture) -> list[Rule]:
    """Return the rules for the MLP of dense layers, and for router, experts and shared expert of MoE layers."""
    first = architecture.first_dense_layers if architecture.num_experts else architecture.num_layers
    dense, sparse = range(first), range(first, architecture.num_layers)
    rules = gated_mlp("mlp", "mlp", dense)
    if not architecture.num_experts:
        return rules
    rules.append(Rename(f"{MEGATRON_LAYER}mlp.router.weight", (f"{HF_LAYER}mlp.gate.weight",), layers=sparse))
    if architecture.router_bias:
        bias = (f"{HF_LAYER}mlp.gate.e_score_correction_bias",)
        rules.append(Rename(f"{MEGATRON_LAYER}mlp.router.expert_bias", bias, layers=sparse))
    experts = ("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}")
    rules += gated_mlp(*experts, sparse, architecture.num_experts)
    if architecture.shared_expert_ffn_hidden_size:
        rules += gated_mlp("mlp.shared_experts", "mlp.shared_experts", sparse)
    return rules


def with_embeddings(architecture: Architecture, layer: Sequence[Rule]) -> list[Rule]:
    """Put the layers' rules between the embedding and the output layer; with tied weights, HF has no output layer."""
    size = architecture.vocab_size
    rules: list[Rule] = [
        Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), size),
        *layer,
        Rename("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not architecture.tied_embeddings:
        rules.append(Vocabulary("output_layer.weight", ("lm_head.weight",), size))
    return rules
