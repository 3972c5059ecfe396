"""The names that a function of --spec builds a transformer layer from, at the path that users write."""

from slime.megatron.model.attention import PackedAttention
from slime.megatron.model.layers import RMSNorm, built_in_layer_spec

__all__ = ["PackedAttention", "RMSNorm", "built_in_layer_spec"]
