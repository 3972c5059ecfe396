"""Micro-batches: rows of a TrainBatch packed into one row of tokens, with the positions that predict response tokens.

- Used by: `core.packing` decides which rows go together; `step` runs the model on what is made here, and `logprobs`
  reads the hidden states at `predicting_R`.
- Invariant: a micro-batch's response columns are in the order of its rows, and `responses_R` gives the index of each
  entry in the batch that it was packed from, which holds the rank's own rows. Over the context-parallel ranks every
  response token is in exactly one micro-batch: on the rank that predicts it.

Example without context parallelism: two rows of 5 and 3 tokens with responses of 3 and 1 tokens. The pack has the
positions 0 ... 7; the response tokens are at 2, 3, 4 and 7, so `predicting_R` is [1, 2, 3, 6].

The same rows on two context-parallel ranks are padded to 8 and 4 tokens and cut in zigzag order (`Cut`):

    pack       0  1  2  3  4  .  .  . | 8  9 10  .      a dot is padding; response tokens: 2, 3, 4 and 10
    rank       0  0  1  1  1  1  0  0 | 0  1  1  0
    rank 0 holds 0 1 . . 8 .            it predicts token 2 from its position 1:          predicting_R = [1]
    rank 1 holds 2 3 4 . 9 10           it predicts 3, 4 and 10 from positions 0, 1 and 4: predicting_R = [0, 1, 4]

Token 2 is predicted on rank 0 although rank 1 holds it: targets are read from the whole pack. A loss that needs whole
responses uses `MicroBatch.responses`, which sums each row's parts over the ranks.

Shapes: _N rows of the batch, _M rows of the micro-batch, _S its sequences (the rows, and one of padding),
_B packed tokens of this rank, _R response tokens that it predicts, _C context-parallel ranks, _P pieces of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.algo.sequences import Sequences
from slime.core.architecture import Architecture
from slime.core.batch import COLUMNS, Array, Axis, RowColumns, TrainBatch
from slime.core.packing import pack_multiple, row_multiple
from slime.megatron import device
from slime.megatron.model.attention import ContextShare, PackedSequences, pack_sequences


@dataclass(frozen=True)
class ContextParallel:
    """This rank's place among the context-parallel ranks, which share every sequence."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """The context-parallel group; None only if one process plays all ranks."""

    @property
    def row_multiple(self) -> int:
        """Every sequence is padded to a multiple of this (see `core.packing`)."""
        return row_multiple(self.size)

    def pack_multiple(self, multiple: int) -> int:
        """Return the multiple to which a pack is padded so that each rank's tokens are a multiple of `multiple`."""
        return pack_multiple(self.size, multiple)


@dataclass(frozen=True)
class Cut:
    """The tokens of a pack that each rank holds (zigzag context parallelism).

    Every sequence is cut into 2 x C chunks, and rank r takes the chunks r and 2 x C - 1 - r. Under a causal mask all
    ranks then have the same amount of work. For example, 8 tokens on 2 ranks: rank 0 holds 0, 1, 6, 7 and rank 1 holds
    2, 3, 4, 5; each rank's queries see 18 keys. Contiguous halves would see 10 and 26. A single rank has each sequence
    in one piece.
    """

    tokens_CB: Array
    """Indices into the pack."""
    lengths_P: Array
    offsets_CP: Array
    """The position in its sequence at which each piece begins."""
    starts_P: Array
    """The position in the pack at which each piece's sequence begins."""

    @classmethod
    def of(cls, lengths_S: Array, num_ranks: int) -> Cut:
        """Cut sequences whose lengths are multiples of `ContextParallel.row_multiple`."""
        starts_S = np.cumsum(lengths_S) - lengths_S
        if num_ranks == 1:
            return cls(np.arange(lengths_S.sum())[None], lengths_S, np.zeros_like(lengths_S)[None], starts_S)
        assert not (lengths_S % (2 * num_ranks)).any()
        ranks_C = np.arange(num_ranks)
        chunks_C2 = np.stack([ranks_C, 2 * num_ranks - 1 - ranks_C], axis=1)
        lengths_P = np.repeat(lengths_S // (2 * num_ranks), 2)
        offsets_CP = np.tile(chunks_C2, len(lengths_S)) * lengths_P
        starts_P = np.repeat(starts_S, 2)
        tokens_CB = np.stack([_ranges(starts_P + offsets_P, lengths_P) for offsets_P in offsets_CP])
        return cls(tokens_CB, lengths_P, offsets_CP, starts_P)

    def places(self) -> Array:
        """Return each pack token's index in the row of all ranks' tokens: [0, 1, 4, 5, 6, 7, 2, 3] in the example."""
        places = np.empty(self.tokens_CB.size, dtype=np.int64)
        places[self.tokens_CB.ravel()] = np.arange(self.tokens_CB.size)
        return places

    def share(self, part: ContextParallel) -> ContextShare:
        """Return what attention needs to know about this rank's pieces."""
        offsets_P = self.offsets_CP[part.rank]
        seen_K = _ranges(self.starts_P, offsets_P + self.lengths_P)
        return ContextShare(offsets_P.tolist(), torch.from_numpy(self.places()[seen_K]), part.group)


ALONE = ContextParallel()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward pass is one, too: every rank's loss reads the sum, so each term gets all gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class SharedSequences(Sequences):
    """Responses that are split over context-parallel ranks; all ranks must request the same sums in the same order."""

    group: dist.ProcessGroup

    def total(self, sums_M: Tensor) -> Tensor:
        return _SumOverRanks.apply(sums_M, self.group)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass. A rank without rows left gets an empty one: padding, and no response tokens."""

    tokens_B: Tensor
    """[1, B]."""
    sequences: PackedSequences
    predicting_R: Tensor
    """The position on this rank whose hidden state predicts each response token: that of the token before it."""
    targets_R: Tensor
    columns: dict[str, Tensor]
    """Every response column of the batch, cut to these tokens."""
    responses_R: Array
    """Each response token's index in the flat columns of the batch that it was packed from."""
    responses: Sequences
    """Maps each response token to its response."""


def _ranges(starts: Array, lengths: Array) -> Array:
    """Concatenate the ranges start, start + 1, ...: starts [3, 9] and lengths [2, 1] give [3, 4, 9]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def padding_tokens(row_tokens: int, part: ContextParallel, multiple: int) -> int:
    """Return the padding after rows of `row_tokens` tokens (each with its own); without rows there is only padding."""
    pack_multiple = part.pack_multiple(multiple)
    return -row_tokens % pack_multiple if row_tokens else pack_multiple


def tokens_on_rank(batch: RowColumns, rows: Sequence[int], part: ContextParallel, multiple: int) -> int:
    """Return the tokens of `pack_rows`' micro-batch on each context-parallel rank, without packing."""
    total_M = batch.total_lengths_N[np.asarray(rows, dtype=np.int64)]
    tokens = int((total_M + -total_M % part.row_multiple).sum())
    return (tokens + padding_tokens(tokens, part, multiple)) // part.size


def pack_rows(
    batch: TrainBatch,
    rows: Sequence[int],
    *,
    arch: Architecture,
    multiple: int,
    part: ContextParallel = ALONE,
    step_tokens: int = 0,
) -> MicroBatch:
    """Pack this rank's part of the rows into one micro-batch, whose number of tokens is a multiple of `multiple`.

    `step_tokens` is the number of tokens in all micro-batches of the step, for auxiliary losses.

    Padding comes after each row if context parallelism needs it there, and as one more sequence after all rows.

    Raises:
        ValueError: a row has no token before its response, from which the first response token could be predicted.
    """
    rows_M = np.asarray(rows, dtype=np.int64)
    total_M, response_M = batch.total_lengths_N[rows_M], batch.response_lengths_N[rows_M]
    if bool((total_M <= response_M).any()):
        sample = batch.columns["sample_indices"][rows_M[np.argmax(total_M <= response_M)]]
        raise ValueError(f"sample {sample} has no prompt: its first response token is predicted from nothing")
    tokens_starts_N = np.cumsum(batch.total_lengths_N) - batch.total_lengths_N
    responses_starts_N = np.cumsum(batch.response_lengths_N) - batch.response_lengths_N

    lengths_S = total_M + -total_M % part.row_multiple
    starts_M = np.cumsum(lengths_S) - lengths_S
    num_padding = padding_tokens(int(lengths_S.sum()), part, multiple)
    if num_padding:
        lengths_S = np.append(lengths_S, num_padding)
    pack = np.full(lengths_S.sum(), COLUMNS["tokens"].padding, dtype=np.int64)
    filled, taken = _ranges(starts_M, total_M), _ranges(tokens_starts_N[rows_M], total_M)
    pack[filled] = batch.columns["tokens"][taken]

    cut = Cut.of(lengths_S, part.size)
    tokens_B = cut.tokens_CB[part.rank]
    answers_R = _ranges(starts_M + total_M - response_M, response_M)
    predicting_R = cut.places()[answers_R - 1] - part.rank * len(tokens_B)
    ours_R = (predicting_R >= 0) & (predicting_R < len(tokens_B))
    responses_R = _ranges(responses_starts_N[rows_M], response_M)[ours_R]
    row_R = np.repeat(np.arange(len(rows_M)), response_M)[ours_R]
    return MicroBatch(
        tokens_B=_sent(pack[tokens_B])[None],
        sequences=replace(
            pack_sequences(cut.lengths_P.tolist(), arch, cut.share(part) if part.size > 1 else None),
            **_for_experts(batch, len(pack), filled, taken, tokens_B) if arch.num_experts else {},
            step_tokens=step_tokens,
        ),
        predicting_R=_sent(predicting_R[ours_R]),
        targets_R=_sent(pack[answers_R][ours_R]),
        columns={
            name: _sent(values[responses_R])
            for name, values in batch.columns.items()
            if COLUMNS[name].axis is Axis.RESPONSE
        },
        responses_R=responses_R,
        responses=_responses(_sent(row_R), len(rows_M), part),
    )


def _for_experts(batch: TrainBatch, size: int, filled: Array, taken: Array, tokens_B: Array) -> dict[str, Tensor]:
    """Return what MoE layers read about a pack of `size` tokens, whose positions `filled` hold the tokens `taken`."""
    counts = np.zeros(size, dtype=bool)
    counts[filled] = True
    found = {"counts_B": counts}
    if batch.has("routed_experts"):
        routes = batch.columns["routed_experts"]
        column = COLUMNS["routed_experts"]
        # without an expert that the router chooses itself, the rows may have come without a sign
        dtype = np.promote_types(routes.dtype, column.dtype)
        experts = np.full((size, *routes.shape[1:]), column.padding, dtype=dtype)
        experts[filled] = routes[taken]
        found["experts_B"] = experts
    return {name: _sent(values[tokens_B]) for name, values in found.items()}


def _sent(values: Array) -> Tensor:
    return device.send(torch.from_numpy(values))


def _responses(row_R: Tensor, num_rows: int, part: ContextParallel) -> Sequences:
    if part.size == 1 or part.group is None:
        return Sequences(row_R, num_rows)
    return SharedSequences(row_R, num_rows, part.group)
