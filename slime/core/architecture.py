"""Architecture: the sizes and options of a decoder-only model, resolved from MODEL_ARGS and the HF config.json.

- Used by: `config.architecture` makes it; Megatron's build, the weight tables and the embedded engine read it.
- Invariant: no field is unset, so an Architecture is enough to build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling of type llama3 (the formula is in `core.rotary`). The defaults are those of Llama 3.1."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder-only model, by Megatron's names.

    `ffn_hidden_size` is the size of one of the two gated halves, `kv_channels` the size of one head.
    """

    family: str
    """HF `model_type`, a key of `slime.models.families.FAMILIES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """The size in config.json, before Megatron's padding."""
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    post_self_attn_layernorm: bool = False
    post_mlp_layernorm: bool = False
    tied_embeddings: bool = False

    num_experts: int = 0
    """The number of routed experts in a layer; 0 means a dense model, for which the fields below have no meaning."""
    moe_ffn_hidden_size: int = 0
    """The size of one routed expert; `ffn_hidden_size` is then the size of the dense layers."""
    moe_router_topk: int = 0
    """The number of experts that each token goes to."""
    first_dense_layers: int = 0
    """The number of dense layers before the first MoE layer; all later layers have experts."""
    shared_expert_ffn_hidden_size: int = 0
    """The size of the shared expert, which every token goes to; for several shared experts, their sum. 0: none."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    """Each expert has a bias that is added to the scores only when experts are chosen; it has no gradient.

    HF's name for it is e_score_correction_bias.
    """
    norm_topk_prob: bool = True
    """Divide the weights of the chosen experts by their sum."""
    routed_scaling_factor: float = 1.0
    router_groups: int = 1
    """The number of groups of experts; a token's experts come from the best `router_topk_groups` of them."""
    router_topk_groups: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Undo `dataclasses.asdict`, also after the values went through JSON."""
        own = dict(values)
        if own.get("rope_scaling") is not None:
            own["rope_scaling"] = RopeScaling(**own["rope_scaling"])
        return cls(**own)

    @property
    def rotary_dim(self) -> int:
        """The number of channels of a head that RoPE rotates."""
        return int(self.kv_channels * self.rotary_percent)

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer number `layer`, counted from 0, has experts."""
        return self.num_experts > 0 and layer >= self.first_dense_layers

    @property
    def num_moe_layers(self) -> int:
        """The number of layers with experts."""
        return self.num_layers - self.first_dense_layers if self.num_experts else 0

    def num_parameters(self) -> int:
        """Return the number of parameters, with the embedding and an untied output layer, without router biases."""
        return self._parameters(self.num_experts)

    def num_active_parameters(self) -> int:
        """Return the number of parameters that one token uses: of the routed experts only the chosen ones."""
        return self._parameters(self.moe_router_topk if self.num_experts else 0)

    def _parameters(self, experts: int) -> int:
        """Count the parameters with `experts` routed experts in each layer."""
        head = self.kv_channels
        qkv = self.hidden_size * head * (self.num_attention_heads + 2 * self.num_query_groups)
        bias = head * (self.num_attention_heads + 2 * self.num_query_groups) if self.add_qkv_bias else 0
        norms = self.hidden_size * (2 + self.post_self_attn_layernorm + self.post_mlp_layernorm)
        norms += 2 * head if self.qk_layernorm else 0
        layer = qkv + bias + norms + self.num_attention_heads * head * self.hidden_size
        moe_ffn = experts * self.moe_ffn_hidden_size + self.shared_expert_ffn_hidden_size
        moe = 3 * self.hidden_size * moe_ffn + self.num_experts * self.hidden_size
        dense_layers = self.num_layers - self.num_moe_layers
        mlps = dense_layers * 3 * self.hidden_size * self.ffn_hidden_size + self.num_moe_layers * moe
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + mlps + tables * self.vocab_size * self.hidden_size + self.hidden_size


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Return the vocabulary size rounded up to a multiple of `divisible_by` x TP, which is Megatron's rule."""
    multiple = divisible_by * tensor_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
