"""Training columns: their values and dtypes, which samples are refused, and samples without a response."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from slime.core import batch as module
from slime.core.batch import COLUMNS, TrainBatch, from_samples
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


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(module)
    assert result.attempted == 9 and result.failed == 0


def full_samples() -> list[Sample]:
    """Return three samples of two groups with all per-token fields; the second has no response."""
    samples = [sample(0, 2, log_probs=True), sample(1, 0, log_probs=False, reward=None), sample(2, 3, log_probs=True)]
    samples[0].loss_mask, samples[2].loss_mask = [1, 0], [0, 1, 1]
    samples[0].policy_versions, samples[2].policy_versions = [4, 4], [4, 5, 5]
    samples[0].routed_experts = np.arange(4 * 2 * 2, dtype=np.int8).reshape(4, 2, 2)
    samples[2].routed_experts = np.full((3, 2, 2), 7, np.int8)  # two tokens fewer than the engine could give
    samples[2].reward = {"score": 0.25}
    samples[0].reward = {"score": 1.0}
    return samples


def test_every_column_has_its_values_and_dtype() -> None:
    batch = from_samples(full_samples(), reward_key="score")
    routes = np.full((14, 2, 2), -1)
    routes[:4] = np.arange(16).reshape(4, 2, 2)
    routes[8:11] = 7
    expected = {
        "tokens": [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5],
        "loss_mask": [1, 0, 0, 1, 1],
        "rewards": [1.0, math.nan, 0.25],
        "group_indices": [0, 0, 1],
        "sample_indices": [0, 1, 2],
        "rollout_log_probs": [-0.5] * 5,
        "policy_versions": [4, 4, 4, 5, 5],
        "routed_experts": routes,
    }
    assert batch.columns.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(batch.columns[name], values, err_msg=name)
        assert batch.columns[name].dtype == COLUMNS[name].dtype, name
    assert batch.total_lengths_N.tolist() == [5, 3, 6] and batch.response_lengths_N.tolist() == [2, 0, 3]
    assert len(batch) == 3
    fixed = {"tokens": "int64", "rewards": "float32", "rollout_log_probs": "float32", "offpolicy": "bool"}
    assert {name: COLUMNS[name].dtype for name in fixed} == fixed, "the loss is computed in float32"


def test_padding_adds_nothing() -> None:
    """Padding entries have mask, weight, advantage and log-prob 0; a number that names something is -1."""
    names = {"group_indices", "sample_indices", "routed_experts", "policy_versions"}
    assert {name: column.padding for name, column in COLUMNS.items() if column.padding} == dict.fromkeys(names, -1)
    required = {name for name, column in COLUMNS.items() if column.required}
    assert required == {"tokens", "loss_mask", "rewards", "group_indices", "sample_indices"}


def test_a_sample_without_a_mask_counts_whole() -> None:
    samples = [sample(0, 2, log_probs=False), sample(1, 3, log_probs=False)]
    samples[1].loss_mask = [0, 0, 1]
    assert from_samples(samples).columns["loss_mask"].tolist() == [1, 1, 0, 0, 1]


def test_rows_move_together_when_selected() -> None:
    batch = from_samples(full_samples(), reward_key="score").select([2, 0])
    assert batch.rows("loss_mask")[0].tolist() == [0, 1, 1] and batch.rows("loss_mask")[1].tolist() == [1, 0]
    assert batch.columns["rewards"].tolist() == [0.25, 1.0]
    assert [len(rows) for rows in batch.rows("routed_experts")] == [6, 5]
    assert batch.response_lengths_N.tolist() == [3, 2]
    nothing = batch.select([])
    assert len(nothing) == 0 and nothing.columns["routed_experts"].shape == (0, 2, 2)


def test_columns_can_be_added_replaced_and_removed() -> None:
    batch = from_samples(full_samples(), reward_key="score")
    added = batch.with_column("advantages", np.arange(5))
    assert added.columns["advantages"].dtype == np.float32 and not batch.has("advantages")
    assert added.with_column("advantages", np.zeros(5)).columns["advantages"].tolist() == [0.0] * 5
    assert added.without("advantages").columns.keys() == batch.columns.keys()


def test_columns_that_do_not_fit_are_refused() -> None:
    batch = from_samples(full_samples(), reward_key="score")
    with pytest.raises(ValueError, match=r"not declared in core.columns.COLUMNS: \['advantage'\]"):
        TrainBatch(batch.total_lengths_N, batch.response_lengths_N, {**batch.columns, "advantage": np.zeros(5)})
    columns = {name: values for name, values in batch.columns.items() if name != "rewards"}
    with pytest.raises(ValueError, match=r"columns missing: \['rewards'\]"):
        TrainBatch(batch.total_lengths_N, batch.response_lengths_N, columns)
    with pytest.raises(ValueError, match="column values has 4 entries, its rows add up to 5"):
        batch.with_column("values", np.zeros(4))
    with pytest.raises(ValueError, match="column values has 2 dimensions, not 1"):
        batch.with_column("values", np.zeros((5, 1)))
    with pytest.raises(ValueError, match="no samples to train on"):
        from_samples([])


def test_routes_for_some_samples_are_refused() -> None:
    samples = full_samples()
    samples[2].routed_experts = None
    with pytest.raises(ValueError, match="sample 2 has no routed_experts, but others do"):
        from_samples(samples, reward_key="score")
    samples[2].routed_experts = np.zeros((5, 2, 3), np.int32)
    with pytest.raises(ValueError, match=r"different \[layers, experts\]: \[\(2, 2\), \(2, 3\)\]"):
        from_samples(samples, reward_key="score")


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
def test_a_failed_generation_decides_no_column(others_have_log_probs: bool) -> None:
    for failed_has_log_probs in (True, False):
        samples = [sample(i, 2, log_probs=others_have_log_probs) for i in range(3)]
        samples.append(sample(3, 0, log_probs=failed_has_log_probs, reward=None))
        assert from_samples(samples).has("rollout_log_probs") is others_have_log_probs


def test_a_column_for_some_samples_is_refused() -> None:
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
