"""DAPO's soft overlong penalty: its equation, and that it changes the training reward alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.algo.overlong import overlong_penalties
from slime.config.args import Args
from slime.core.batch import from_samples
from slime.core.sample import Sample, Status
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_weight_columns
from slime.megatron.share import Share
from slime.rollout.acceptance import mask_truncated


def equation_13(length: int, longest: int, cache: int) -> float:
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize(("longest", "cache", "factor"), [(20480, 4096, 1.0), (64, 1, 1.0), (40, 39, 0.25)])
def test_penalties_match_the_paper(longest: int, cache: int, factor: float) -> None:
    lengths = [*range(0, 2 * longest, max(1, longest // 97)), longest - cache, longest - cache + 1, longest]
    found = overlong_penalties(torch.tensor(lengths), max_length=longest, buffer=cache, factor=factor)
    expected = [factor * equation_13(length, longest, cache) for length in lengths]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    moved = overlong_penalties(torch.tensor(lengths), max_length=longest + 1, buffer=cache, factor=factor)
    assert not torch.allclose(moved, found, rtol=1e-6, atol=0)  # control


def group(rewards: list[float | None], lengths: list[int], longest: int) -> list[Sample]:
    return [
        Sample(
            group_index=0,
            index=index,
            tokens=[1] * (2 + length),
            prompt_length=2,
            response_length=length,
            reward=reward,
            status=Status.TRUNCATED if length >= longest else Status.COMPLETED,
        )
        for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    ]


LENGTHS = [3, 8, 6, 10, 4]
REWARDS: list[float | None] = [1.0, 1.0, 0.0, 1.0, None]


def test_estimators_read_the_penalized_reward() -> None:
    args = Args(rollout_max_response_len=10, overlong_buffer_len=4, overlong_penalty_factor=0.5)
    batch = from_samples(group(REWARDS, LENGTHS, 10))
    counted = counted_rows_of(args, batch)
    made, metrics = advantage_columns(args, Share.alone(batch), batch.columns, counted)
    found = replace(batch, columns=batch.columns | made)
    punished = np.asarray([1.0, 1.0 - 0.25, 0.0, 1.0 - 0.5])
    expected = (punished - punished.mean()) / (punished.std(ddof=1) + 1e-6)
    firsts = [row[0] for row in found.rows("advantages")][:4]
    assert firsts == pytest.approx(expected, rel=1e-6)
    assert metrics["train/overlong_penalty"] == pytest.approx(-0.75 / 4)
    assert metrics["train/overlong_samples"] == 0.5
    assert batch.columns["rewards"][:4].tolist() == [1.0, 1.0, 0.0, 1.0], "the rewards of the batch are unchanged"
    plain, none = advantage_columns(Args(rollout_max_response_len=10), Share.alone(batch), batch.columns, counted)
    assert none == {}
    assert not np.allclose(plain["advantages"], found.columns["advantages"])  # control


def test_truncated_samples_count_in_the_baseline_only() -> None:
    def weighted(args: Args) -> tuple[np.ndarray, list[np.ndarray]]:
        samples = group(REWARDS, LENGTHS, 10)
        mask_truncated(args, samples)
        batch = from_samples(samples)
        counted = counted_rows_of(args, batch)
        advantages, _ = advantage_columns(args, Share.alone(batch), batch.columns, counted)
        weights, sums = loss_weight_columns(args, Share.alone(batch), batch.columns, counted)
        batch = replace(batch, columns=batch.columns | advantages | weights)
        assert sums == [1.0]
        return np.asarray([row.sum() for row in batch.rows("loss_weights")]), batch.rows("advantages")

    weights, advantages = weighted(Args(mask_truncated_samples=True))
    assert weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    every, same = weighted(Args())
    assert every == pytest.approx([1 / 4] * 4 + [0])
    assert [row[0] for row in advantages[:3]] == [row[0] for row in same[:3]]
