"""The forward pass: a decoder built from an `Architecture`, with fused buffers and views of them by HF name.

- Called by: `checkpoint` and weight updates write into `Model.weights`; `scheduler` calls `prefill` and `decode`.
- Invariant: every HF tensor is a view into exactly one buffer, so writing a tensor by its HF name is the whole update.

For example, `qkv` is one buffer [(H + 2K) * D, hidden], and `q_proj.weight` is a view of its first H * D rows.

Shape suffixes: _N flat tokens, _B running requests, _P prompts; S padded prompt length, H query heads, K key/value
heads, D channels of a head, M cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slime.core.architecture import Architecture
from slime.core.rotary import inverse_frequencies
from slime.engine.embedded.attention import attend_in_blocks, blocks_mask
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.mlp import Dense, Experts
from slime.models.families import FAMILIES


@dataclass(frozen=True)
class Layer:
    """The buffers of one decoder layer; None if the architecture has no such tensor."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Dense | Experts
    post_mlp_norm: Tensor | None


class Attend(Protocol):
    """Attention over the cache: q [N, H, D], kv [N, 2, K, D] -> [N, H * D]; it also stores keys and values."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor: ...


class KeepRoutes(Protocol):
    """Stores the experts [N, K] of tokens in one layer; `moe_layer` counts from the first layer with experts."""

    def __call__(self, moe_layer: int, experts: Tensor) -> None: ...


class Model:
    """Weights and forward pass. `weights` maps HF names to views; a tied output layer has no name of its own."""

    def __init__(self, architecture: Architecture, *, dtype: torch.dtype = torch.float32) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self.weights: dict[str, Tensor] = {}
        a = architecture
        self.embedding = self._new("model.embed_tokens.weight", a.vocab_size, a.hidden_size)
        self.layers = [self._new_layer(f"model.layers.{i}.", moe=a.is_moe_layer(i)) for i in range(a.num_layers)]
        self.final_norm = self._new("model.norm.weight", a.hidden_size)
        self.head = self.embedding if a.tied_embeddings else self._new("lm_head.weight", a.vocab_size, a.hidden_size)
        self._rotation = _rotation_table(a)
        self._epsilon = torch.tensor(a.norm_epsilon)

    def _new(self, name: str, *shape: int) -> Tensor:
        tensor = torch.zeros(shape, dtype=self.dtype)
        self.weights[name] = tensor
        return tensor

    def _new_fused(self, parts: dict[str, int], *columns: int) -> Tensor:
        """Return one buffer whose rows belong to several HF tensors: {name: rows}."""
        buffer = torch.zeros((sum(parts.values()), *columns), dtype=self.dtype)
        self.weights.update(zip(parts, buffer.split(list(parts.values())), strict=True))
        return buffer

    def _new_layer(self, prefix: str, *, moe: bool) -> Layer:
        a = self.architecture
        hidden, head = a.hidden_size, a.kv_channels
        rows = {"q": a.num_attention_heads * head, "k": a.num_query_groups * head, "v": a.num_query_groups * head}
        attn = f"{prefix}self_attn."
        qkv = self._new_fused({f"{attn}{x}_proj.weight": n for x, n in rows.items()}, hidden)
        bias = self._new_fused({f"{attn}{x}_proj.bias": n for x, n in rows.items()}) if a.add_qkv_bias else None
        return Layer(
            input_norm=self._new(f"{prefix}input_layernorm.weight", hidden),
            qkv=qkv,
            qkv_bias=bias,
            q_norm=self._new(f"{attn}q_norm.weight", head) if a.qk_layernorm else None,
            k_norm=self._new(f"{attn}k_norm.weight", head) if a.qk_layernorm else None,
            o=self._new(f"{attn}o_proj.weight", hidden, a.num_attention_heads * head),
            post_attention_norm=(
                self._new(f"{prefix}post_self_attn_layernorm.weight", hidden) if a.post_self_attn_layernorm else None
            ),
            # In HF's sandwich-norm families this is still the name of the norm before the MLP.
            mlp_norm=self._new(f"{prefix}post_attention_layernorm.weight", hidden),
            mlp=self._new_experts(f"{prefix}mlp.") if moe else self._new_mlp(f"{prefix}mlp.", a.ffn_hidden_size),
            post_mlp_norm=self._new(f"{prefix}post_mlp_layernorm.weight", hidden) if a.post_mlp_layernorm else None,
        )

    def _new_mlp(self, prefix: str, ffn: int) -> Dense:
        hidden = self.architecture.hidden_size
        if FAMILIES[self.architecture.family].fused_gate_up:
            gate_up = self._new(f"{prefix}gate_up_proj.weight", 2 * ffn, hidden)
        else:
            gate_up = self._new_fused({f"{prefix}gate_proj.weight": ffn, f"{prefix}up_proj.weight": ffn}, hidden)
        return Dense(gate_up, self._new(f"{prefix}down_proj.weight", hidden, ffn))

    def _new_experts(self, prefix: str) -> Experts:
        a = self.architecture
        count, ffn, hidden, shared = (
            a.num_experts,
            a.moe_ffn_hidden_size,
            a.hidden_size,
            a.shared_expert_ffn_hidden_size,
        )
        gate_up = torch.zeros(count, 2 * ffn, hidden, dtype=self.dtype)
        down = torch.zeros(count, hidden, ffn, dtype=self.dtype)
        for i in range(count):
            gate, up = gate_up[i].chunk(2)
            own = {"gate_proj": gate, "up_proj": up, "down_proj": down[i]}
            self.weights |= {f"{prefix}experts.{i}.{name}.weight": tensor for name, tensor in own.items()}
        bias = None
        if a.router_bias:
            # The bias is fp32 whatever dtype the model has: it changes by steps that bf16 cannot represent.
            bias = self.weights[f"{prefix}gate.e_score_correction_bias"] = torch.zeros(count)
        return Experts(
            architecture=a,
            router=self._new(f"{prefix}gate.weight", count, hidden),
            bias=bias,
            gate_up=gate_up,
            down=down,
            shared=self._new_mlp(f"{prefix}shared_experts.", shared) if shared else None,
        )

    def _forward(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        keep_routes: KeepRoutes | None,
        *,
        every_expert: bool = False,
    ) -> Tensor:
        """Return hidden states [N, hidden], after the final norm."""
        a = self.architecture
        heads, groups, head = a.num_attention_heads, a.num_query_groups, a.kv_channels
        rotation = self._rotation[positions_N].unsqueeze(1)
        x = F.embedding(tokens_N, self.embedding)
        for i, w in enumerate(self.layers):
            qkv = F.linear(self._norm(x, w.input_norm), w.qkv, w.qkv_bias).view(-1, heads + 2 * groups, head)
            if w.q_norm is not None and w.k_norm is not None:
                q, k, v = qkv.split([heads, groups, groups], dim=1)
                qkv = torch.cat([self._norm(q, w.q_norm), self._norm(k, w.k_norm), v], dim=1)
            self._rotate(qkv[:, : heads + groups], rotation)
            q, kv = qkv.split([heads, 2 * groups], dim=1)
            y = F.linear(attend(i, q, kv.unflatten(1, (2, groups))), w.o)
            x += y if w.post_attention_norm is None else self._norm(y, w.post_attention_norm)
            y = self._norm(x, w.mlp_norm)
            if isinstance(w.mlp, Dense):
                y = w.mlp(y)
            else:
                experts, weights = w.mlp.route(y)
                if keep_routes is not None:
                    keep_routes(i - a.first_dense_layers, experts)
                y = w.mlp(y, experts, weights, every=every_expert)
            x += y if w.post_mlp_norm is None else self._norm(y, w.post_mlp_norm)
        return self._norm(x, self.final_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        eps = self.architecture.norm_epsilon
        if x.dtype != torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        # RMS norm in fewer operators: at these sizes the number of operators decides the time of a step.
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse_rms = torch.addcmul(self._epsilon, norms, norms, value=1 / x.shape[-1]).rsqrt_()
        return torch.mul(x, inverse_rms).mul_(weight)

    def _rotate(self, x: Tensor, rotation: Tensor) -> None:
        """Apply RoPE in place to x [N, heads, D]: channel pairs are complex numbers, turned by `rotation` [N, 1, P]."""
        a = self.architecture
        turning = x[..., : a.rotary_dim]
        if a.rotary_interleaved and x.dtype == torch.float32:
            torch.view_as_complex(turning.unflatten(-1, (-1, 2))).mul_(rotation)
            return
        wide = turning.float()
        real, imag = (wide[..., ::2], wide[..., 1::2]) if a.rotary_interleaved else wide.chunk(2, dim=-1)
        turned = torch.complex(real, imag) * rotation
        pairs = [turned.real, turned.imag]
        turning.copy_(torch.stack(pairs, dim=-1).flatten(-2) if a.rotary_interleaved else torch.cat(pairs, dim=-1))

    def logits(self, hidden_N: Tensor) -> Tensor:
        """Return logits [N, vocabulary] in fp32."""
        return F.linear(hidden_N, self.head).float()

    def prefill(self, prompts_P: list[list[int]], cache: KVCache, first_row: int) -> Tensor:
        """Run whole prompts into the cache rows from `first_row` on; return hidden states [P, S, hidden].

        Prompts are padded on the right: causal attention never looks there, and what the padding writes into the
        cache is overwritten before it is read.
        """
        a = self.architecture
        count, width = len(prompts_P), max(map(len, prompts_P))
        tokens = torch.zeros(count, width, dtype=torch.long)
        for i, ids in enumerate(prompts_P):
            tokens[i, : len(ids)] = torch.tensor(ids)
        positions = torch.arange(width).expand(count, width).reshape(-1)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            q, k, v = (t.unflatten(0, (count, width)).transpose(1, 2) for t in (q, kv[:, 0], kv[:, 1]))
            cache.write_prompts(layer, first_row, k, v)
            grouped = a.num_attention_heads != a.num_query_groups
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return out.transpose(1, 2).reshape(count * width, -1)

        def keep_routes(moe_layer: int, experts: Tensor) -> None:
            cache.write_prompt_routes(moe_layer, first_row, experts.unflatten(0, (count, width)))

        keep = keep_routes if cache.keeps_routes else None
        return self._forward(tokens.flatten(), positions, attend, keep).unflatten(0, (count, width))

    def decode(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
        """Run one token for each of the first B cache rows, at `positions_B`; return hidden states [B, hidden]."""
        a = self.architecture
        batch, groups, head = len(tokens_B), a.num_query_groups, a.kv_channels
        span = int(positions_B.max()) + 1
        rows = torch.arange(batch)
        future = torch.arange(span) > positions_B[:, None]
        mask = torch.zeros(batch, 1, 1, span).masked_fill_(future[:, None, None], float("-inf"))
        # Query heads that share keys are rows of one matrix, so that keys are not repeated.
        per_group = a.num_attention_heads // groups
        mask = mask.expand(batch, groups, per_group, span).reshape(batch * groups, per_group, span)
        scale = head**-0.5

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache.write_tokens(layer, rows, positions_B, kv)
            keys, values = (t.flatten(0, 1) for t in cache.read(layer, batch, span))
            queries = q.reshape(batch * groups, per_group, head)
            if q.dtype == torch.float32:
                scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale)
            else:  # the mask is fp32, and so is the softmax
                scores = torch.add(mask, torch.bmm(queries, keys.transpose(1, 2)), alpha=scale)
            return torch.bmm(torch.softmax(scores, dim=-1).to(values.dtype), values).view(batch, -1)

        return self._forward(tokens_B, positions_B, attend, _keep_token_routes(cache, rows, positions_B))

    def decode_in_blocks(self, tokens_B: Tensor, positions_B: Tensor, cache: KVCache, first_row: int) -> Tensor:
        """Run `decode` for B cache rows from `first_row` on; a row's result does not depend on the others' lengths."""
        a = self.architecture
        batch, groups, head = len(tokens_B), a.num_query_groups, a.kv_channels
        rows = torch.arange(first_row, first_row + batch)
        per_group = a.num_attention_heads // groups
        mask = blocks_mask(positions_B, groups=groups, per_group=per_group)

        def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
            cache.write_tokens(layer, rows, positions_B, kv)
            span = mask.shape[0] * mask.shape[-1]
            keys, values = (t.flatten(0, 1) for t in cache.read(layer, batch, span, first=first_row))
            return attend_in_blocks(q.reshape(batch * groups, per_group, head), keys, values, mask).view(batch, -1)

        keep_routes = _keep_token_routes(cache, rows, positions_B)
        return self._forward(tokens_B, positions_B, attend, keep_routes, every_expert=True)


def _keep_token_routes(cache: KVCache, rows_B: Tensor, positions_B: Tensor) -> KeepRoutes | None:
    if not cache.keeps_routes:
        return None
    return lambda moe_layer, experts: cache.write_token_routes(moe_layer, rows_B, positions_B, experts)


def _rotation_table(architecture: Architecture) -> Tensor:
    """Return exp(i * position * frequency), complex64 [positions, rotary pairs]."""
    positions = torch.arange(architecture.max_position_embeddings).float()
    angles = torch.outer(positions, inverse_frequencies(architecture))
    return torch.polar(torch.ones_like(angles), angles)
