"""Advantages and loss weights as columns of a whole rollout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.core.packing import StepPlan
from slime.core.rank_batch import rank_batches
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_options, loss_weight_columns
from slime.megatron.share import Share


def _batch() -> TrainBatch:
    """Make two groups of four samples; in the second group one reward failed."""
    batch = tiny.random_batch(8)
    rewards = np.asarray([1, 0, 0, 1, 1, 1, 0, np.nan], dtype=np.float32)
    return batch.with_column("rewards", rewards)


def _with_advantages(args: Args, batch: TrainBatch) -> TrainBatch:
    made, _ = advantage_columns(args, Share.alone(batch), batch.columns, counted_rows_of(args, batch))
    return replace(batch, columns=batch.columns | made)


def test_a_sample_without_reward_is_not_counted() -> None:
    batch = _batch()
    assert counted_rows_of(Args(), batch).tolist() == [True] * 7 + [False]
    assert counted_rows_of(Args(loss_type="sft_loss"), batch).all()
    alone = batch.with_column("rewards", np.asarray([1, 0, 0, 1, 1, np.nan, np.nan, np.nan]))
    assert counted_rows_of(Args(), alone).tolist() == [True] * 4 + [False] * 4
    hook = Args(custom_advantage_function_path="somewhere.else")
    assert counted_rows_of(hook, alone).tolist() == [True] * 5 + [False] * 3


def test_each_response_token_has_its_samples_advantage() -> None:
    batch = _batch()
    rows = _with_advantages(Args(), batch).rows("advantages")
    assert all(len(row) == length for row, length in zip(rows, batch.response_lengths_N, strict=True))
    std = np.std([1, 0, 0, 1], ddof=1)
    assert rows[0] == pytest.approx(0.5 / std, abs=1e-5) and rows[1] == pytest.approx(-0.5 / std, abs=1e-5)
    assert rows[6] == pytest.approx(-2 / 3 / np.std([1, 1, 0], ddof=1), abs=1e-5)
    assert not rows[7].any()
    plain = _with_advantages(Args(disable_grpo_std_normalization=True), batch)
    assert plain.rows("advantages")[0] == pytest.approx(0.5)


def test_whitened_over_the_tokens_that_count() -> None:
    batch = _batch()
    counted = counted_rows_of(Args(), batch)
    advantages = _with_advantages(Args(normalize_advantages=True), batch).columns["advantages"]
    counts = batch.columns["loss_mask"] * np.repeat(counted, batch.response_lengths_N) > 0
    assert advantages[counts].mean() == pytest.approx(0, abs=1e-6)
    assert advantages[counts].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_weights_sum_to_1_in_every_step(per_token: bool) -> None:
    batch = _batch()
    args = Args(calculate_per_token_loss=per_token)
    steps = [[4, 0, 2], [1, 3, 5, 6], [7]]  # in any order
    [part] = rank_batches(batch, [StepPlan([[step]]) for step in steps])
    made, sums = loss_weight_columns(args, Share(part, None), batch.columns, counted_rows_of(args, batch))
    batch = replace(batch, columns=batch.columns | made)
    assert sums == [1.0, 1.0, 0.0]
    weights, masks = batch.rows("loss_weights"), batch.rows("loss_mask")
    for step, expected in zip(steps, sums, strict=True):
        assert sum(weights[row].sum() for row in step) == pytest.approx(expected, abs=1e-6)
    assert not any(row_weights[mask == 0].any() for row_weights, mask in zip(weights, masks, strict=True))
    if per_token:
        assert weights[0].max() == pytest.approx(1 / sum(masks[row].sum() for row in steps[0]))
    else:
        assert weights[0].sum() == pytest.approx(1 / 3) and weights[1].sum() == pytest.approx(1 / 4)


def test_options_are_resolved() -> None:
    assert loss_options(Args(eps_clip=0.1)).eps_clip_high == 0.1
    assert loss_options(Args(eps_clip=0.1, eps_clip_high=0.3)).eps_clip_high == 0.3
    assert loss_options(Args(kl_loss_coef=0.5)).kl_loss_coef == 0  # without --use-kl-loss
    assert loss_options(Args(kl_loss_coef=0.5, use_kl_loss=True)).kl_loss_coef == 0.5
