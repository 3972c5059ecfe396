"""A custom transformer layer: the same function, with the MLP's activation recomputed instead of stored.

    --spec examples.custom_layer.lean_mlp layer_spec

--spec names a module and a function in it. The function gets slime's args and Megatron's TransformerConfig, and returns
the ModuleSpec of one layer, from which every layer of the model is built. Start from the built-in spec and change what
you want. Four rules:

1. The layer's parameters keep their names and shapes, because the weight table moves them between Megatron, HF files
   and the engines. A new, missing or renamed parameter stops the run when weights are loaded, with its name.
2. The engines must compute the same function. slime changes nothing in them, so a layer with another function needs
   engines that serve it. Otherwise train and rollout log-probs diverge, and --logprob-gap-alarm reports it.
3. Attention is packed. Megatron's own core attention is replaced by slime.megatron.layers.PackedAttention, which
   applies rotary positions and keeps the sequences of a pack apart. Your own core attention is kept, and must do both.
4. With --sequence-parallel, a parameter that every tensor-parallel rank holds whole needs `sequence_parallel = True`,
   as in slime.megatron.layers.RMSNorm; otherwise its gradient is not summed over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slime.config.args import Args
from slime.megatron.layers import built_in_layer_spec


class LeanMLP(MLP):
    """SwiGLU that does not store silu(gate) for the backward pass: a quarter less memory between the linear layers."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> Any:
        assert per_token_scale is None, "only experts have a scale per token"
        gate_up, _no_bias = self.linear_fc1(hidden_states)
        product = checkpoint(self.activation, gate_up, use_reentrant=False)
        return self.linear_fc2(product)

    @staticmethod
    def activation(gate_up: Tensor) -> Tensor:
        gate, up = torch.chunk(gate_up, 2, dim=-1)
        return F.silu(gate) * up


def layer_spec(args: Args, config: TransformerConfig) -> ModuleSpec:
    """Return the built-in layer with LeanMLP as its MLP."""
    spec = built_in_layer_spec(args, config)
    parts = spec.submodules
    assert isinstance(parts, TransformerLayerSubmodules) and isinstance(parts.mlp, ModuleSpec)
    parts.mlp.module = LeanMLP
    return spec
