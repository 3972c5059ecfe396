"""The activations kept for the backward pass, in bytes per operation, for one rank and one micro-batch.

- Used by: `memory_model`, which adds them to the memory that a rank always holds. `moe_activations` has the operations
  of layers with experts.
- Invariant: no number is fitted. Each is a product of the shapes of tensors in `slime.megatron`, megatron-core's layers
  or PyTorch's kernels.

`query`, `ffn` and `vocabulary` are the sizes on this rank, 1/TP of the model's. `rows` are the tokens that norms and
residuals work on, 1/TP of the pack with sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from slime.config.args import Args
from slime.config.memory import KEPT_LOGITS
from slime.core.architecture import Architecture, padded_vocab_size
from slime.plan.moe_activations import moe_operations, replayed_experts
from slime.plan.rank import FP32, TOKEN_ID, Operation, Rank, backward_peak, forward_peak


def _norm(rank: Rank, name: str, rows: int, channels: int, *, arriving: int = 0) -> Operation:
    """Return the RMSNorm of `rows` vectors. `arriving`: bytes of its output's gradient if not the residual stream's."""
    size = rows * channels
    if rank.on_cuda:  # the fused kernel keeps its input
        saved, working = rank.width * size, rank.width * size
    elif rank.width == FP32:  # megatron.model.kernels.cpu keeps the normalized input
        saved, working = FP32 * size, 2 * FP32 * size
    else:  # PyTorch's composite norm keeps both in fp32, and makes four more such tensors in its backward pass
        saved, working = 2 * FP32 * size, 4 * FP32 * size
    return Operation(name, saved + FP32 * rows, rank.residual + arriving + working)


def _attention(rank: Rank) -> list[Operation]:
    """Return the operations from the QKV projection to the output projection."""
    query, key, heads = rank.query, rank.key, rank.arch.num_attention_heads // rank.tp
    qkv = query + 2 * key
    log_sums = FP32 * rank.tokens * heads
    hidden = rank.arch.hidden_size
    operations = [
        Operation(
            "QKV projection: its input",
            rank.residual,
            rank.residual + rank.values(qkv + hidden) + rank.weight_gradient(hidden * qkv),
        )
    ]
    if rank.on_cuda:
        # one kernel splits, norms and rotates; only the norms read the projection's output again
        saved = rank.values(qkv) if rank.arch.qk_layernorm else 0
        operations.append(Operation("split into heads", saved, rank.residual + rank.values(2 * qkv)))
    elif rank.arch.qk_layernorm:
        groups = rank.arch.num_query_groups // rank.tp
        norms = _norm(rank, "norms of queries and keys", rank.tokens * (heads + groups), rank.arch.kv_channels)
        operations.append(Operation(norms.name, norms.saved, norms.working + rank.values(qkv)))
    gathered = int(rank.values(key) * rank.keys_per_token)  # as many bytes of values
    if rank.on_cuda:
        # The varlen kernel keeps rotated queries and keys, values, and the output (also the projection's input).
        kept = rank.values(2 * query) + 2 * gathered
        # backward: gradients of output and queries (also in fp32), and of keys and values for every query head;
        # FlashAttention-4 has these in fp32 for every key head instead, which is no more
        expanded = 0 if query == key else 2 * int(rank.values(query) * rank.keys_per_token)
        working = rank.residual + rank.values(2 * query) + FP32 * rank.tokens * query + expanded + 2 * gathered
        operations.append(Operation("attention: q, k, v, output", kept + log_sums, working))
        projection_input = 0
    else:
        # Sequences are padded into rectangles, and the output is unpadded into another tensor for the projection.
        kept = rank.values(2 * query) + 2 * gathered
        working = rank.residual + rank.values(2 * query + 2 * qkv)
        operations.append(Operation("attention: q, k, v, output", kept + log_sums, working))
        projection_input = rank.values(query)
    operations.append(
        Operation(
            "output projection: its input",
            projection_input,
            2 * rank.residual + rank.values(query) + rank.weight_gradient(hidden * query),
        )
    )
    return operations


def _mlp(rank: Rank) -> list[Operation]:
    hidden, ffn = rank.arch.hidden_size, rank.ffn
    # gradients of output, gate and up; megatron.model.kernels.cpu also has a tensor with gradient x up
    glu = (3 if rank.on_cuda or rank.width < FP32 else 4) * ffn
    kept = 2 if rank.on_cuda else 3
    return [
        Operation(
            "MLP, first: its input",
            rank.residual,
            rank.residual + rank.values(2 * ffn + hidden) + rank.weight_gradient(2 * ffn * hidden),
        ),
        # silu(gate) is kept as well, but not by the fused kernel
        Operation("SwiGLU: gate and up", rank.values(kept * ffn), 2 * rank.residual + rank.values(glu)),
        Operation(
            "MLP, second: its input",
            rank.values(ffn),
            2 * rank.residual + rank.values(ffn) + rank.weight_gradient(ffn * hidden),
        ),
    ]


def layer_operations(rank: Rank, *, experts: bool = False) -> list[Operation]:
    """Return the operations of one transformer layer in the order of its forward pass; `experts`: with an MoE layer."""
    arch, hidden = rank.arch, rank.arch.hidden_size

    def norm(name: str, *, arriving: int = 0) -> Operation:
        return _norm(rank, name, rank.rows, hidden, arriving=arriving)

    operations = [norm("norm before attention", arriving=rank.residual), *_attention(rank)]
    # a GPU has the gradients of both results at once: of the sum, and of the norm that is computed with it
    both = rank.residual if rank.on_cuda else 0
    operations += [norm("norm after attention", arriving=both)] if arch.post_self_attn_layernorm else []
    operations += [norm("norm before MLP", arriving=rank.residual), *(moe_operations(rank) if experts else _mlp(rank))]
    operations += [norm("norm after MLP", arriving=both)] if arch.post_mlp_layernorm else []
    return operations


def _recomputed(rank: Rank, unit: Sequence[Operation], *, kept: int, shared: int) -> Operation:
    """Return a recomputed unit: only its input is kept, and it runs forward again before it runs backward.

    `kept`: bytes of the input. `shared`: bytes that its operations keep and that are the input itself. The output of
    the second forward pass exists as long as the unit runs backward.
    """
    again = max(backward_peak(unit), forward_peak(unit))
    return Operation("recomputed: its input", kept, rank.residual + again - shared)


def stage_operations(
    args: Args, rank: Rank, *, layers: Sequence[int], is_first: bool, is_last: bool
) -> list[Operation]:
    """Return the operations of a pipeline stage with these layers on one micro-batch, with recomputation applied."""
    arch = rank.arch
    kinds = {experts: layer_operations(rank, experts=experts) for experts in {*map(arch.is_moe_layer, layers)}}
    shared = rank.residual if rank.on_cuda else 0  # the first norm keeps the residual stream itself
    if args.recompute_granularity == "selective":
        kinds = {experts: [_selective(rank, operation) for operation in kind] for experts, kind in kinds.items()}
    in_order = [kinds[arch.is_moe_layer(layer)] for layer in layers]

    def recomputed(unit: Sequence[list[Operation]]) -> Operation:
        return _recomputed(rank, [*chain.from_iterable(unit)], kept=rank.residual, shared=shared)

    if args.recompute_granularity == "full":
        size = min(args.recompute_num_layers or 1, len(layers))
        if args.recompute_method == "block":  # each of the first `size` layers by itself, the others not at all
            kept = [*map(recomputed, ([layer] for layer in in_order[:size])), *chain.from_iterable(in_order[size:])]
        else:
            kept = [recomputed(in_order[start : start + size]) for start in range(0, len(layers), size)]
    else:
        kept = [*chain.from_iterable(in_order)]
    table = local_vocabulary(args, arch) * arch.hidden_size
    rotary = FP32 * rank.tokens * arch.rotary_dim  # cos and sin, the same for all layers
    operations = [Operation("rotary tables and token ids", rotary + 2 * TOKEN_ID * rank.tokens, 0)]
    if args.use_routing_replay:
        operations.append(Operation("experts to replay", replayed_experts(rank), 0))
    if is_first:
        operations.append(Operation("embedding", 0, rank.residual + rank.weight_gradient(table)))
    operations += kept
    if is_last:
        operations.append(_norm(rank, "final norm", rank.rows, arch.hidden_size))
    return operations


def _selective(rank: Rank, operation: Operation) -> Operation:
    """Return the operation with recomputed core attention, which keeps only its inputs and its output."""
    if not operation.name.startswith("attention:"):
        return operation
    # On a CPU another operation counts the output, but values are a view of the whole projection's output.
    kept = rank.values(2 * rank.query + (2 if rank.on_cuda else 3) * rank.key)
    return Operation("attention, recomputed: its input", kept, operation.working + operation.saved)


def log_probs_operation(args: Args, rank: Rank) -> Operation:
    """Return the operation that computes the response tokens' log-probs chunk by chunk.

    The backward pass computes logits again, except those that a GPU kept.
    """
    logits, chunk = _chunk(args, rank)
    hidden = rank.arch.hidden_size
    table = local_vocabulary(args, rank.arch) * hidden
    kept = 0
    if rank.on_cuda:
        whole_chunks = KEPT_LOGITS // (rank.width * logits)
        kept = min(whole_chunks * logits, rank.tokens * local_vocabulary(args, rank.arch)) * rank.width
    # The output layer's gradient: in bf16 each chunk's product is added to the gradient buffer (on a GPU without a
    # copy), in fp32 the chunks are summed in another tensor first. Before that, a CPU holds a chunk's logits twice in
    # fp32, and with bf16 also twice in bf16.
    fresh = 0 if kept else logits  # the gradient of kept logits replaces them
    half = rank.width < FP32
    product = 0 if rank.on_cuda and half else rank.width * table
    adding = rank.width * (fresh + chunk * hidden) + product
    if not rank.on_cuda:
        making = 2 * FP32 + (2 * rank.width if half else 0)
        adding = max(making * logits, adding)
    working = rank.values(hidden) + (rank.width * table if half else FP32 * table) + adding
    return Operation("log-probs: the last hidden states, kept logits", rank.values(hidden) + kept, working)


def log_probs_forward(args: Args, rank: Rank) -> int:
    """Return the bytes of log-probs without a backward pass.

    On a CPU, bf16 hidden states and logits exist in both dtypes.
    """
    logits, _ = _chunk(args, rank)
    hidden = rank.tokens * rank.arch.hidden_size
    if rank.on_cuda:
        return rank.width * (hidden + 2 * logits)
    both = FP32 * hidden + rank.width * logits if rank.width < FP32 else 0
    return rank.width * hidden + 2 * FP32 * logits + both


def _chunk(args: Args, rank: Rank) -> tuple[int, int]:
    """Return the number of logits in one chunk on this rank, and the chunk's number of tokens."""
    tokens = min(args.resolved.log_probs_chunk_size, rank.tokens)
    return tokens * local_vocabulary(args, rank.arch), tokens


def local_vocabulary(args: Args, arch: Architecture) -> int:
    """Return the number of padded vocabulary entries on one tensor-parallel rank."""
    tp = args.tensor_model_parallel_size
    return padded_vocab_size(arch.vocab_size, args.make_vocab_size_divisible_by, tp) // tp
