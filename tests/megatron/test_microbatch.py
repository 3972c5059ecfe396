"""Rows of a batch as one pack: positions, targets, columns, padding."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_attention import SHAPE

from slime.core.batch import TrainBatch
from slime.megatron.microbatch import pack_rows


def test_every_response_token_is_predicted_from_the_one_before() -> None:
    batch = tiny.random_batch()
    rows = [5, 0, 3]
    packed = pack_rows(batch, rows, shape=SHAPE, multiple=1)
    tokens = [batch.rows("tokens")[row] for row in rows]
    assert packed.tokens_B[0].tolist() == np.concatenate(tokens).tolist()
    answers = [row_tokens[-batch.response_lengths_N[row] :] for row, row_tokens in zip(rows, tokens, strict=True)]
    assert packed.targets_R.tolist() == np.concatenate(answers).tolist()
    assert packed.tokens_B[0, packed.predicting_R + 1].equal(packed.targets_R)
    for name in ("loss_mask", "rollout_log_probs"):
        expected = np.concatenate([batch.rows(name)[row] for row in rows])
        assert packed.columns[name].tolist() == expected.tolist()
        assert batch.columns[name][packed.responses_R].tolist() == expected.tolist()
    assert "rewards" not in packed.columns and "tokens" not in packed.columns


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_padding_is_a_sequence_of_its_own(multiple: int) -> None:
    batch = tiny.random_batch()
    plain = pack_rows(batch, [1, 2], shape=SHAPE, multiple=1)
    padded = pack_rows(batch, [1, 2], shape=SHAPE, multiple=multiple)
    size = padded.tokens_B.size(1)
    assert size % multiple == 0 and size - padded.num_tokens < multiple
    assert padded.num_tokens == plain.num_tokens == plain.tokens_B.size(1)
    assert padded.predicting_R.equal(plain.predicting_R)
    ends = padded.sequences.cu_seqlens_q
    assert ends is not None and ends[2] == padded.num_tokens and ends[-1] == size


def test_no_rows_make_a_pack_without_responses() -> None:
    packed = pack_rows(tiny.random_batch(), [], shape=SHAPE, multiple=4)
    assert packed.tokens_B.shape == (1, 4) and packed.num_tokens == 0
    assert len(packed.targets_R) == len(packed.predicting_R) == len(packed.columns["loss_mask"]) == 0


def test_positions_start_anew_in_each_sequence() -> None:
    batch = tiny.random_batch()
    packed = pack_rows(batch, [0, 1], shape=SHAPE, multiple=1).sequences
    assert packed.cos_B is not None and packed.sin_B is not None
    first, second = batch.total_lengths_N[:2]
    shorter = min(first, second)
    assert torch.equal(packed.cos_B[:shorter], packed.cos_B[first : first + shorter])
    assert packed.sin_B[0].tolist() == packed.sin_B[first].tolist() == [0.0] * (SHAPE.rotary_dim // 2)


def test_a_response_without_prompt_is_an_error() -> None:
    batch = tiny.random_batch(2, group=2)
    lengths = batch.response_lengths_N
    tokens = batch.columns["tokens"][: int(lengths.sum())]
    headless = TrainBatch(lengths, lengths, {**batch.columns, "tokens": tokens})
    with pytest.raises(ValueError, match="sample 1 has no prompt"):
        pack_rows(headless, [1], shape=SHAPE, multiple=1)
