"""A transformer layer whose steps between two matrix products are one pass over memory each.

- Used by: `layers` puts these classes into a layer's spec, `moe` builds its layer on PackedLayer, and `build` links the
  layers of a stage.
- Invariant: they compute what Megatron's layer with separate norms, sums and rotations computes; on a CPU bit for bit.

Two places are fused. Queries, keys and values come from the QKV projection's output split, normed and rotated
(PackedSelfAttention). A sub-layer's output joins the residual stream together with the norm that reads the sum:

    attention -> [+ residual, norm before MLP] -> MLP -> [+ residual, norm of the next layer] -> ...

The sum and its norm are computed before the norm is called. So the sum goes through Megatron's code as usual, and the
norm returns its result when it is called with this very tensor (`RMSNorm.expect`). If it is called with another tensor,
it computes as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from slime.megatron.model.attention import PackedAttention, PackedSequences
from slime.megatron.model.kernels import add_and_norm, rms_norm, split_heads


class RMSNorm(torch.nn.Module):
    """RMSNorm with the mark by which Megatron sums its gradient over tensor-parallel ranks (sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        self._expected: tuple[Tensor, Tensor] | None = None

    def expect(self, x: Tensor, result: Tensor) -> None:
        """Let the next call return `result`, the norm of `x` that was computed with x, if it is called with `x`."""
        self._expected = x, result

    def forward(self, x: Tensor) -> Tensor:
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] is x:
            return expected[1]
        return rms_norm(x, self.weight, self.eps)


class PackedSelfAttention(SelfAttention):
    """Self-attention that norms and rotates queries and keys as it splits the QKV projection's output.

    With another core attention than PackedAttention, which then applies positions itself, or with other norms of
    queries and keys than RMSNorm, it leaves the split to Megatron.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_pack: PackedSequences | None = None
        core, norms = self.core_attention, {type(self.q_layernorm), type(self.k_layernorm)}
        self._splits = type(core) is PackedAttention and norms in ({RMSNorm}, {IdentityOp}, {type(None)})
        if type(core) is PackedAttention and self._splits:
            core.rotates = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._given_pack = kwargs["packed_seq_params"]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._given_pack = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return q [B, 1, h, d], k and v [B, 1, g, d] of hidden states [B, 1, H], at their positions if it splits."""
        if not self._splits:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        pack = self._given_pack
        assert pack is not None and pack.cos_B is not None and pack.sin_B is not None, "training is always packed"
        project: Any = self.linear_qkv
        mixed, _ = project(hidden_states)
        q_norm: Any = self.q_layernorm
        k_norm: Any = self.k_layernorm
        parts = split_heads(
            mixed.squeeze(1),
            pack.cos_B,
            pack.sin_B,
            (q_norm.weight, k_norm.weight) if isinstance(q_norm, RMSNorm) else None,
            num_heads=self.num_attention_heads_per_partition,
            num_groups=self.num_query_groups_per_partition,
            eps=self.config.layernorm_epsilon,
            interleaved=self.config.rotary_interleaved,
        )
        return tuple(part.unsqueeze(1) for part in parts)


class PackedLayer(TransformerLayer):
    """A transformer layer that adds a sub-layer's output to the residual stream in one pass with the norms around."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._norm_of_next: tuple[RMSNorm, ...] = ()  # a tuple, because its weight is not this layer's
        self.self_attn_bda = self._joining(self.self_attn_bda, "post_self_attn_layernorm", self._norm_before_mlp)
        self.mlp_bda = self._joining(self.mlp_bda, "post_mlp_layernorm", lambda: self._norm_of_next)
        # Megatron's would record gradients of the norms in there for a forward pass that has no backward pass
        self.bias_dropout_add_exec_handler = nullcontext

    def set_next_norm(self, norm: object) -> None:
        """Set the module that reads this layer's output first; only an RMSNorm is computed in one pass with the sum."""
        self._norm_of_next = (norm,) if isinstance(norm, RMSNorm) else ()

    def _norm_before_mlp(self) -> tuple[RMSNorm, ...]:
        """Return the norm that reads the sum after attention; nothing if another module might read it first."""
        norm = self.pre_mlp_layernorm
        between = self.pre_cross_attn_layernorm, self.cross_attention
        direct = all(isinstance(module, IdentityOp) for module in between) and not self.recompute_pre_mlp_layernorm
        return (norm,) if direct and isinstance(norm, RMSNorm) else ()

    def _joining(
        self, add: Callable[..., Any], own_norm: str, following: Callable[[], tuple[RMSNorm, ...]]
    ) -> Callable[..., Any]:
        """Return Megatron's `add` (bias, dropout, sum) with the norms around; `own_norm` is that of the output."""

        def outer(training: bool, fused: bool) -> Callable[..., Tensor]:
            def inner(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
                output, bias = output_and_bias
                own: Any = self._modules.get(own_norm)
                if (training and dropout) or bias is not None or output.dtype != residual.dtype:
                    if own is not None:
                        output, bias = own(output if bias is None else output + bias), None
                    return add(training, fused)((output, bias), residual, dropout)
                norms = following()
                if own is None and not norms:
                    return add(training, fused)((output, None), residual, dropout)
                weights = (None if own is None else own.weight), (norms[0].weight if norms else None)
                total, normed = add_and_norm(output, residual, *weights, self.config.layernorm_epsilon)
                if normed is not None:
                    norms[0].expect(total, normed)
                return total

            return inner

        return outer


def link_layers(layers: Iterable[torch.nn.Module], final_norm: object) -> None:
    """Tell each layer of a stage which norm reads its output.

    Do not call it if whole layers are recomputed: when a layer runs again, the norm after it does not.
    """
    for layer, following in pairwise([*layers, None]):
        if not isinstance(layer, PackedLayer):
            continue
        if following is None:
            layer.set_next_norm(final_norm)
        elif isinstance(following, TransformerLayer) and not following.recompute_input_layernorm:
            layer.set_next_norm(following.input_layernorm)
