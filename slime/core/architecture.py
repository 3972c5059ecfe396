"""Architecture: the shape of a decoder-only model, resolved from MODEL_ARGS and the HF config.json.

Path: `config.architecture` makes it, then Megatron's build, the weight tables and the embedded engine read it.
Invariant: nothing here is "unset"; whoever holds one can build the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling of type llama3; `core.rotary` says what it does. The defaults are Llama 3.1's."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes are Megatron's: `ffn_hidden_size` of one of the two gated halves, `kv_channels` of one head."""

    family: str
    """HF `model_type`: 'glm4', 'glm4_moe', 'llama', 'qwen2', 'qwen3', 'qwen3_moe'."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """As in config.json, before Megatron's padding."""
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
    """Routed experts of a layer; 0: a dense model, which the fields below say nothing about."""
    moe_ffn_hidden_size: int = 0
    """Of one routed expert; `ffn_hidden_size` is then that of the dense layers."""
    moe_router_topk: int = 0
    """Experts that a token goes to."""
    first_dense_layers: int = 0
    """Layers before the first one of experts; all behind it have experts."""
    shared_expert_ffn_hidden_size: int = 0
    """Of the expert that every token goes to (several shared ones are one of their sizes' sum); 0: none."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    """A bias an expert that is added to scores for the choice alone (HF e_score_correction_bias): no gradient."""
    norm_topk_prob: bool = True
    """The chosen experts' weights are divided by their sum."""
    routed_scaling_factor: float = 1.0
    router_groups: int = 1
    """Groups of experts; a token's come from the best `router_topk_groups` of them."""
    router_topk_groups: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Undoes `dataclasses.asdict`, also after a way through JSON."""
        own = dict(values)
        if own.get("rope_scaling") is not None:
            own["rope_scaling"] = RopeScaling(**own["rope_scaling"])
        return cls(**own)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE rotates."""
        return int(self.kv_channels * self.rotary_percent)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, has experts."""
        return self.num_experts > 0 and layer >= self.first_dense_layers

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.first_dense_layers if self.num_experts else 0

    def num_parameters(self) -> int:
        """Parameters, the embedding and the output layer (if it is one of its own) counted; a router's bias is none."""
        return self._parameters(self.num_experts)

    def num_active_parameters(self) -> int:
        """Those that one token passes through: of routed experts only the chosen ones."""
        return self._parameters(self.moe_router_topk if self.num_experts else 0)

    def _parameters(self, experts: int) -> int:
        """With `experts` routed experts a layer."""
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
    """Megatron's rule: the next multiple of `divisible_by` x TP."""
    multiple = divisible_by * tensor_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
