"""Rows of a batch as one pack: positions, targets, columns, padding, and its parts under context parallelism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SHAPE

from slime.core.batch import TrainBatch
from slime.megatron.microbatch import ContextParallel, Cut, MicroBatch, pack_rows


def test_each_response_token_is_predicted_by_its_predecessor() -> None:
    batch = tiny.random_batch()
    rows = [5, 0, 3]
    packed = pack_rows(batch, rows, arch=SHAPE, multiple=1)
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
    plain = pack_rows(batch, [1, 2], arch=SHAPE, multiple=1)
    padded = pack_rows(batch, [1, 2], arch=SHAPE, multiple=multiple)
    size, num_tokens = padded.tokens_B.size(1), int(batch.total_lengths_N[1:3].sum())
    assert size % multiple == 0 and size - num_tokens < multiple
    assert plain.tokens_B.size(1) == num_tokens
    assert padded.predicting_R.equal(plain.predicting_R)
    ends = padded.sequences.cu_seqlens_q
    assert ends is not None and ends[2] == num_tokens and ends[-1] == size


def test_no_rows_make_a_pack_without_responses() -> None:
    packed = pack_rows(tiny.random_batch(), [], arch=SHAPE, multiple=4)
    assert packed.tokens_B.shape == (1, 4)
    assert len(packed.targets_R) == len(packed.predicting_R) == len(packed.columns["loss_mask"]) == 0


def test_positions_start_at_0_in_each_sequence() -> None:
    batch = tiny.random_batch()
    packed = pack_rows(batch, [0, 1], arch=SHAPE, multiple=1).sequences
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
        pack_rows(headless, [1], arch=SHAPE, multiple=1)


def _parts(batch: TrainBatch, rows: list[int], num_ranks: int, multiple: int) -> list[MicroBatch]:
    """Return the micro-batch of each context-parallel rank."""
    return [
        pack_rows(batch, rows, arch=SHAPE, multiple=multiple, part=ContextParallel(rank, num_ranks))
        for rank in range(num_ranks)
    ]


def _problems(batch: TrainBatch, rows: list[int], parts: list[MicroBatch], multiple: int) -> set[str]:
    """Return what is wrong with the parts; the control below uses the same list of rules."""
    found: set[str] = set()
    if len({part.tokens_B.size(1) for part in parts}) != 1 or parts[0].tokens_B.size(1) % multiple:
        found.add("size")
    starts = np.cumsum(batch.response_lengths_N) - batch.response_lengths_N
    expected = np.concatenate([starts[row] + np.arange(batch.response_lengths_N[row]) for row in rows])
    places = np.concatenate([part.responses_R for part in parts])
    if sorted(places.tolist()) != sorted(expected.tolist()):
        found.add("some response token is missing, or there twice")
    answers = np.concatenate([batch.rows("tokens")[row][-batch.response_lengths_N[row] :] for row in range(len(batch))])
    before = np.concatenate(
        [batch.rows("tokens")[row][-batch.response_lengths_N[row] - 1 : -1] for row in range(len(batch))]
    )
    positions = np.concatenate(
        [np.arange(total - length, total) - 1 for total, length in zip(*_lengths(batch), strict=True)]
    )
    angles = torch.from_numpy(positions)[:, None] * _frequencies()
    for part in parts:
        here = part.responses_R
        if part.targets_R.tolist() != answers[here].tolist():
            found.add("target")
        if part.tokens_B[0, part.predicting_R].tolist() != before[here].tolist():
            found.add("predicting token")
        assert part.sequences.cos_B is not None
        if not torch.allclose(part.sequences.cos_B[part.predicting_R], angles[here].cos().float(), atol=1e-5):
            found.add("position")
        for name in ("loss_mask", "rollout_log_probs"):
            if part.columns[name].tolist() != batch.columns[name][here].tolist():
                found.add("column")
    return found


def _lengths(batch: TrainBatch) -> tuple[list[int], list[int]]:
    return batch.total_lengths_N.tolist(), batch.response_lengths_N.tolist()


def _frequencies() -> torch.Tensor:
    return 10000.0 ** -(torch.arange(0, SHAPE.rotary_dim, 2).double() / SHAPE.rotary_dim)


@settings(max_examples=40, deadline=None)
@given(
    responses=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    num_ranks=st.integers(1, 4),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_parts_hold_every_response_once(responses: list[int], num_ranks: int, multiple: int, seed: int) -> None:
    batch = tiny.random_batch(len(responses), group=1, seed=seed, lengths=responses)
    rows = list(range(len(responses)))[::-1][: seed + 1]
    parts = _parts(batch, rows, num_ranks, multiple)
    assert _problems(batch, rows, parts, multiple) == set()


def test_wrong_parts_are_noticed() -> None:
    batch, rows = tiny.random_batch(), [0, 1, 2]
    parts = _parts(batch, rows, 2, 1)
    first, second = parts
    assert _problems(batch, rows, parts, 1) == set()
    assert (
        _problems(batch, rows, [first], 1)
        == _problems(batch, rows, [first, second, second], 1)
        == {"some response token is missing, or there twice"}
    )
    exchanged = [replace(first, tokens_B=second.tokens_B), second]
    assert _problems(batch, rows, exchanged, 1) == {"predicting token"}
    shifted = replace(first, targets_R=first.targets_R.roll(1))
    assert _problems(batch, rows, [shifted, second], 1) == {"target"}
    whole = pack_rows(batch, rows, arch=SHAPE, multiple=1).sequences  # positions without any cut
    assert _problems(batch, rows, [replace(first, sequences=whole), second], 1) == {"position"}
    assert _problems(batch, rows, parts, 64) == {"size"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 5))
def test_cutting_and_assembling_is_the_identity(chunks: list[int], num_ranks: int) -> None:
    """Every token is on exactly one rank, at the place where `places` finds it, in the piece that contains it."""
    lengths_S = np.array(chunks) * ContextParallel(0, num_ranks).row_multiple
    cut = Cut.of(lengths_S, num_ranks)
    pack = np.random.default_rng(0).permutation(int(lengths_S.sum()))
    row = pack[cut.tokens_CB].ravel()
    assert row[cut.places()].tolist() == pack.tolist()
    for tokens_B, offsets_P in zip(cut.tokens_CB, cut.offsets_CP, strict=True):
        pieces = zip((cut.starts_P + offsets_P).tolist(), cut.lengths_P.tolist(), strict=True)
        assert tokens_B.tolist() == [start + i for start, length in pieces for i in range(length)]
    if num_ranks > 1:  # control
        assert row[np.roll(cut.places(), 1)].tolist() != pack.tolist()


def test_a_rank_without_responses_still_has_tokens() -> None:
    batch = tiny.random_batch(1, group=1, lengths=[1])
    parts = _parts(batch, [0], 4, 1)
    assert sorted(len(part.responses_R) for part in parts) == [0, 0, 0, 1]
    assert len({part.tokens_B.size(1) for part in parts}) == 1
    nothing = _parts(batch, [], 4, 2)
    assert all(part.tokens_B.shape == (1, 2) and not len(part.responses_R) for part in nothing)
