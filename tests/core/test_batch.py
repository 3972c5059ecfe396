"""Training columns: what samples must carry, and what a sample without a response leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slime.core.batch import from_samples
from slime.core.sample import Sample, Status


def sample(index: int, response: int, *, log_probs: bool, reward: float | None = 1.0) -> Sample:
    return Sample(
        group_index=index // 2,
        index=index,
        tokens=list(range(3 + response)),
        prompt_length=3,
        response_length=response,
        rollout_log_probs=[-0.5] * response if log_probs else None,
        reward=reward,
        status=Status.COMPLETED,
    )


def test_columns_hold_the_rows_in_order() -> None:
    batch = from_samples([sample(0, 2, log_probs=True), sample(1, 3, log_probs=True, reward=None)])
    assert batch.total_lengths_N.tolist() == [5, 6]
    assert batch.columns["group_indices"].tolist() == [0, 0]
    assert math.isnan(batch.columns["rewards"][1])
    assert [row.tolist() for row in batch.rows("tokens")] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    picked = batch.select([1])
    assert picked.rows("rollout_log_probs")[0].tolist() == [-0.5] * 3
    with_advantages = batch.with_column("advantages", np.arange(5.0))
    assert with_advantages.rows("advantages")[1].tolist() == [2, 3, 4]


@pytest.mark.parametrize("others_have_log_probs", [True, False])
def test_a_failed_generation_neither_gives_nor_denies_a_column(others_have_log_probs: bool) -> None:
    for failed_has_log_probs in (True, False):
        samples = [sample(i, 2, log_probs=others_have_log_probs) for i in range(3)]
        samples.append(sample(3, 0, log_probs=failed_has_log_probs, reward=None))
        assert from_samples(samples).has("rollout_log_probs") is others_have_log_probs


def test_a_column_for_some_samples_only_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 samples have rollout_log_probs"):
        from_samples([sample(0, 2, log_probs=True), sample(1, 2, log_probs=False)])


def test_samples_that_lost_their_group_are_refused() -> None:
    with pytest.raises(ValueError, match="group_index -1"):
        from_samples([Sample(tokens=[1, 2], prompt_length=1, response_length=1, reward=1.0)])


def test_fields_that_disagree_in_length_are_refused() -> None:
    broken = sample(0, 2, log_probs=True)
    broken.loss_mask = [1]
    with pytest.raises(ValueError, match="loss_mask has 1 entries for 2 response tokens"):
        from_samples([broken])
