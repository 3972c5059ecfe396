"""The activations that a layer of experts keeps for the backward pass, in bytes per operation, instead of an MLP's.

- Used by: `activations`, for the layers with experts.
- Invariant: no number is fitted. Each is a product of the shapes of tensors in `slime.megatron.model` or in Megatron's
  all-to-all dispatcher. Routing is balanced: every expert gets equally many tokens.

For a layer of t tokens on this rank, of which each goes to K of E experts:

    shared expert   every token, before the router
    router          t x E scores, and the weights and the choice that follow from them
    dispatch        K copies of each token go to the ranks of their experts, and are sorted by expert
    experts         all at once: the loop over experts holds the same tensors as a grouped matrix product
    combine         the way back: sorted, sent, and added up for each token
"""

from __future__ import annotations

from slime.core.columns import routes_dtype
from slime.plan.rank import FP32, TOKEN_ID, Operation, Rank


def moe_operations(rank: Rank) -> list[Operation]:
    """Return the operations of a layer of experts in the order of its forward pass, without the layer's norms."""
    shared = _shared_expert(rank)
    return [*shared, _router(rank, keeps_input=not shared), _dispatch(rank), *_experts(rank), _combine(rank)]


def _shared_expert(rank: Rank) -> list[Operation]:
    """Return the operations of Megatron's MLP, whose SwiGLU is not fused. They run backward after all others."""
    ffn, hidden = rank.arch.shared_expert_ffn_hidden_size // rank.tp, rank.arch.hidden_size
    if not ffn:
        return []
    arriving = 2 * rank.residual  # the output's gradient, and that of the input from the router and the dispatch
    return [
        Operation(
            "shared expert, first: its input",
            rank.residual,
            arriving + rank.values(2 * ffn + hidden) + rank.weight_gradient(2 * ffn * hidden),
        ),
        # gate and up, silu(gate), and a copy of up to which Megatron has added an offset of 0; backward, the gradients
        # of the copies and of gate and up
        Operation("shared expert, SwiGLU: gate and up", rank.values(4 * ffn), arriving + rank.values(4 * ffn)),
        Operation(
            "shared expert, second: its input",
            rank.values(ffn),
            arriving + rank.values(ffn) + rank.weight_gradient(ffn * hidden),
        ),
    ]


def _router(rank: Rank, *, keeps_input: bool) -> Operation:
    """Return the router, which computes in fp32. `keeps_input`: no shared expert keeps the same tensor already."""
    experts, hidden = rank.arch.num_experts, rank.arch.hidden_size
    # scores, weights and the mask by expert of every token; weights and numbers of the chosen experts
    saved = rank.rows * experts * (2 * FP32 + 1) + rank.sent * (FP32 + 2 * TOKEN_ID)
    # gradients of weights, of scores and of logits; of the input, for which a bf16 model has a second copy in fp32
    working = 3 * FP32 * rank.rows * experts + FP32 * rank.rows * hidden + FP32 * experts * hidden
    working += rank.residual if rank.width < FP32 else 0
    return Operation(
        "router: its input and scores", saved + (rank.residual if keeps_input else 0), 2 * rank.residual + working
    )


def routing_kept(rank: Rank, *, recomputed: bool) -> int:
    """Return the bytes of a layer's last routing, which Megatron's dispatcher holds until the next forward pass.

    They are the weights and the mask of all experts, and the order in which tokens were sorted. The order is also kept
    for the backward pass, unless the whole layer is `recomputed`. Without other ranks nothing is held.
    """
    if not rank.shares_experts:
        return 0
    return rank.rows * rank.arch.num_experts * (FP32 + 1) + (TOKEN_ID * rank.sent if recomputed else 0)


def replayed_experts(rank: Rank) -> int:
    """Return the bytes of the column with an engine's choice for each token of a pack (routing replay)."""
    arch = rank.arch
    return rank.tokens * arch.num_moe_layers * arch.moe_router_topk * routes_dtype(arch.num_experts).itemsize


def copies(rank: Rank) -> tuple[int, int]:
    """Return the bytes of the hidden states that this rank sends, and of the states that it receives."""
    hidden = rank.width * rank.arch.hidden_size
    return rank.sent * hidden, rank.received * hidden


def _moved(rank: Rank) -> int:
    """Return the most bytes while copies are sorted, sent or gathered: those of two such tensors at a time."""
    sent, received = copies(rank)
    if not rank.shares_experts:  # a GPU's kernel reads the rows of a token where they are
        return sent * (1 if rank.on_cuda else 2)
    sizes = [sent]
    if rank.ep > 1:
        sizes.append(2 * sent)
    if rank.etp > 1:
        sizes.append(received + max(sent, _summed(rank)))
    if rank.experts > 1:
        sizes.append(2 * received)
    return max(sizes)


def _dispatch(rank: Rank) -> Operation:
    # without other ranks: the rows of each token, the token of each row, and its place among the weights
    orders = 1 if rank.shares_experts else 3
    return Operation("dispatch: the order of tokens", orders * TOKEN_ID * rank.sent, rank.residual + _moved(rank))


def _combine(rank: Rank) -> Operation:
    stream = 0 if rank.on_cuda else rank.residual  # after attention; a GPU's norm keeps the same tensor
    shared = rank.residual if rank.arch.shared_expert_ffn_hidden_size else 0  # the shared expert's output
    moved = _moved(rank) if rank.shares_experts else copies(rank)[0]  # backward, no copy is added up
    return Operation("combine", 0, rank.residual + moved, forward=experts_forward(rank) + stream + shared)


def experts_forward(rank: Rank) -> int:
    """Return the bytes that the forward pass of the experts needs in addition to what it keeps.

    Their outputs are held once more in another order, to be sent or added up. If tokens are sent, Megatron's layer also
    holds the tokens that it has sent and received until the experts are done. If not, a GPU needs no other order.
    """
    sent, received = copies(rank)
    if not rank.shares_experts:
        return received * (1 if rank.on_cuda else 2)
    return sent * (2 if rank.ep > 1 else 1) + 2 * received + _summed(rank)


def _summed(rank: Rank) -> int:
    """Return the bytes of the sum over the ranks that share an expert, which Megatron computes in fp32.

    A GPU has the sum in a tensor of its own, a CPU in a copy of the parts.
    """
    if rank.etp == 1:
        return 0
    hidden = FP32 * rank.arch.hidden_size
    parts = hidden * rank.received if rank.width < FP32 else 0
    return parts + hidden * (rank.sent if rank.on_cuda else rank.received)


def _experts(rank: Rank) -> list[Operation]:
    """Return the operations of all experts of this rank on the tokens that they share."""
    ffn, hidden, half = rank.expert_ffn, rank.arch.hidden_size, rank.width < FP32

    def values(channels: int) -> int:
        return rank.received * channels * rank.width

    def weight_gradient(size: int) -> int:
        """Return the bytes of the gradient of all experts; a bf16 loop adds each expert's, and returns a dummy."""
        return max(rank.experts * size * rank.width, rank.weight_gradient(size))

    first = Operation(
        "experts: their tokens",
        values(hidden) + FP32 * rank.received,
        rank.residual + values(2 * ffn + hidden) + weight_gradient(2 * ffn * hidden),
    )
    second = (values(ffn), rank.residual + values(hidden + ffn) + weight_gradient(ffn * hidden))
    if rank.on_cuda:  # a kernel computes the product with the token's weight again
        gate = Operation("experts: gate and up", values(2 * ffn), rank.residual + values(3 * ffn))
        return [first, gate, Operation("experts: weighted product", *second)]
    # a token's weight is fp32, and so are its product with a bf16 value, and the gradients of both
    weighted = FP32 * rank.received * ffn
    weighing = 2 * weighted + values(ffn) if half else 3 * weighted
    return [
        first,
        # backward, the gradients of gate, up and their product; in fp32 also gradient x up
        Operation("experts: gate and up", values(3 * ffn), rank.residual + values(ffn) * (3 if half else 4)),
        Operation("experts: product", values(ffn), rank.residual + weighing),
        Operation("experts: weighted product", *second, forward=weighted if half else 0),
    ]
