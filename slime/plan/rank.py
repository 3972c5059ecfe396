"""One operation of the forward pass, and the sizes of the training rank that it runs on.

- Used by: `activations` and `moe_activations`, which have the tables of operations, and `memory_model`.
- Invariant: nothing here knows which operations a model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from slime.core.architecture import Architecture

FP32 = 4
TOKEN_ID = 8


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass, on one micro-batch."""

    name: str
    saved: int
    """The bytes that it keeps for its backward pass, which frees them at its end."""
    working: int
    """The additional bytes during its backward pass: gradients and intermediate results."""
    forward: int = 0
    """The additional bytes during its forward pass, where these are more than a backward pass needs later."""


def saved_bytes(operations: Iterable[Operation]) -> int:
    """Return the bytes that all operations keep for the backward pass."""
    return sum(operation.saved for operation in operations)


def backward_peak(operations: Sequence[Operation]) -> int:
    """Return the largest number of bytes at one time while `operations` run backward, the last one first.

    With operations A and B that save 5 and 3 bytes and work with 1 and 4, it is max(5 + 3 + 4, 5 + 1) = 12.
    """
    saved = accumulate(operation.saved for operation in operations)
    return max((kept + operation.working for kept, operation in zip(saved, operations, strict=True)), default=0)


def forward_peak(operations: Sequence[Operation]) -> int:
    """Return the largest number of bytes at one time while `operations` run forward and keep what backward needs."""
    saved = accumulate(operation.saved for operation in operations)
    return max((kept + operation.forward for kept, operation in zip(saved, operations, strict=True)), default=0)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The sizes of one training rank in elements; `width` is in bytes."""

    arch: Architecture
    tokens: int
    rows: int
    width: int
    tp: int
    cp: int = 1
    ep: int = 1
    """The number of ranks that share the experts."""
    etp: int = 1
    """The number of ranks that share the matrices of one expert."""
    on_cuda: bool

    @property
    def query(self) -> int:
        """Return the number of query channels on this rank."""
        return self.arch.num_attention_heads * self.arch.kv_channels // self.tp

    @property
    def key(self) -> int:
        """Return the number of key channels on this rank, which equals that of values."""
        return self.arch.num_query_groups * self.arch.kv_channels // self.tp

    @property
    def keys_per_token(self) -> float:
        """Return the number of gathered keys per token of this rank, averaged over its two chunks.

        In zigzag context parallelism a sequence is cut into 2 x CP chunks, and rank r holds chunk r and its mirror
        2 x CP - 1 - r. They attend to r + 1 and 2 x CP - r chunks of keys: together 2 x CP + 1 for two chunks of
        tokens, on every rank alike.
        """
        return (2 * self.cp + 1) / 2 if self.cp > 1 else 1

    @property
    def ffn(self) -> int:
        """Return the number of MLP channels on this rank."""
        return self.arch.ffn_hidden_size // self.tp

    @property
    def experts(self) -> int:
        """Return the number of experts in a layer on this rank."""
        return self.arch.num_experts // self.ep

    @property
    def expert_ffn(self) -> int:
        """Return the number of channels of one expert on this rank."""
        return self.arch.moe_ffn_hidden_size // self.etp

    @property
    def shares_experts(self) -> bool:
        """True if other ranks hold a part of the experts, so that tokens are sent."""
        return self.ep * self.etp > 1

    @property
    def sent(self) -> int:
        """Return the number of copies of its tokens that a rank sends to experts: one for each chosen expert."""
        return self.rows * self.arch.moe_router_topk

    @property
    def received(self) -> int:
        """Return the number of copies that reach the experts on this rank if the routing is balanced.

        Of the EP x ETP ranks that share the experts, each sends `sent` copies. A share of 1/EP of them goes to the
        experts on this rank, and each of the ETP ranks of an expert gets all of its tokens.

        With 8 experts on 4 ranks, 100 tokens a rank and 2 experts a token, there are 800 copies for 8 experts, and 200
        reach the 2 experts of a rank.
        """
        return self.sent * self.etp

    @property
    def residual(self) -> int:
        """Return the bytes of the residual stream; its gradient has as many during the whole backward pass."""
        return self.width * self.rows * self.arch.hidden_size

    def values(self, channels: int) -> int:
        """Return the bytes of `channels` channels of every token."""
        return self.width * self.tokens * channels

    def weight_gradient(self, size: int) -> int:
        """Return the bytes of a weight's gradient before it is added to the fp32 buffer.

        A CPU first makes an fp32 copy of a bf16 gradient.
        """
        return size * (self.width + (FP32 if self.width < FP32 and not self.on_cuda else 0))
