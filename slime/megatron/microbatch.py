"""Micro-batches: rows of a TrainBatch as one packed row of tokens, and where its response tokens are predicted.

Path: `core.packing` says which rows go together; what is made here goes through the model in `step`, and `logprobs`
reads the hidden states at `predicting_R`. Invariant: the response columns of a micro-batch lie in the order of its
rows, and `responses_R` says where each of their entries lies in the whole batch.

Shapes: _N rows of the whole batch, _M rows of the micro-batch, _B packed tokens with padding, _R response tokens of
the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.core.architecture import Architecture
from slime.core.batch import COLUMNS, Array, Axis, TrainBatch
from slime.megatron import device
from slime.megatron.attention import PackedSequences, pack_sequences


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input. A rank without rows left takes an empty one: some padding, and no response tokens."""

    tokens_B: Tensor
    """[1, B]."""
    sequences: PackedSequences
    predicting_R: Tensor
    """The packed position whose hidden state predicts each response token: the one before it."""
    targets_R: Tensor
    columns: dict[str, Tensor]
    """Every response column of the batch."""
    responses_R: Array
    """Each response token's place in the whole batch's flat columns."""
    num_tokens: int
    """Tokens without padding."""


def _ranges(starts: Array, lengths: Array) -> Array:
    """start, start + 1, ... of each range, one range behind the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def pack_rows(batch: TrainBatch, rows: Sequence[int], *, shape: Architecture, multiple: int) -> MicroBatch:
    """The rows as one micro-batch, padded to a multiple of `multiple` tokens by a sequence of padding behind them.

    Raises:
        ValueError: a row whose response has no token before it to be predicted from.
    """
    rows_M = np.asarray(rows, dtype=np.int64)
    total_M, response_M = batch.total_lengths_N[rows_M], batch.response_lengths_N[rows_M]
    if bool((total_M <= response_M).any()):
        sample = batch.columns["sample_indices"][rows_M[np.argmax(total_M <= response_M)]]
        raise ValueError(f"sample {sample} has no prompt: its first response token is predicted from nothing")
    tokens_starts_N = np.cumsum(batch.total_lengths_N) - batch.total_lengths_N
    responses_starts_N = np.cumsum(batch.response_lengths_N) - batch.response_lengths_N
    tokens = batch.columns["tokens"][_ranges(tokens_starts_N[rows_M], total_M)]
    responses_R = _ranges(responses_starts_N[rows_M], response_M)

    num_tokens = len(tokens)
    num_padding = -num_tokens % multiple if num_tokens else multiple
    padding = np.full(num_padding, COLUMNS["tokens"].padding, dtype=np.int64)
    packed_starts_M = np.cumsum(total_M) - total_M
    answers_R = _ranges(packed_starts_M + total_M - response_M, response_M)
    where = device.device()
    return MicroBatch(
        tokens_B=torch.from_numpy(np.concatenate([tokens, padding]))[None].to(where),
        sequences=pack_sequences([*total_M.tolist(), *([num_padding] if num_padding else [])], shape),
        predicting_R=torch.from_numpy(answers_R - 1).to(where),
        targets_R=torch.from_numpy(tokens[answers_R]).to(where),
        columns={
            name: torch.from_numpy(values[responses_R]).to(where)
            for name, values in batch.columns.items()
            if COLUMNS[name].axis is Axis.RESPONSE
        },
        responses_R=responses_R,
        num_tokens=num_tokens,
    )
