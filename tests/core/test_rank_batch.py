"""The cut of a rollout into one part a data-parallel rank: nothing is lost, and a part is small."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.core.batch import COLUMNS, TrainBatch
from slime.core.columns import Axis
from slime.core.packing import plan_steps
from slime.core.rank_batch import joined, rank_batches, smallest_dtype

ROUTES = (3, 2)
"""MoE layers and experts of a token."""


def batch_of(prompts: list[int], responses: list[int], *, seed: int = 0, fractions: bool = False) -> TrainBatch:
    """Make rows of these lengths with every column that a rollout brings; responses may be empty."""
    chance = np.random.default_rng(seed)
    total, num_responses, rows = sum(prompts) + sum(responses), sum(responses), len(prompts)
    mask = chance.integers(0, 2, num_responses).astype("float32")
    columns = {
        "tokens": chance.integers(0, 151_936, total),
        "loss_mask": mask * chance.random(num_responses).astype("float32") if fractions else mask,
        "rewards": np.where(np.arange(rows) == 1, np.nan, chance.random(rows)).astype("float32"),
        "group_indices": np.arange(rows) // 2,
        "sample_indices": 100 + np.arange(rows),
        "routed_experts": chance.integers(-1, 128, (total, *ROUTES)).astype(COLUMNS["routed_experts"].dtype),
        "rollout_log_probs": -chance.exponential(size=num_responses).astype("float32"),
        "policy_versions": chance.integers(3, 5, num_responses).astype("int32"),
    }
    lengths = np.asarray(responses, dtype="int64")
    return TrainBatch(np.asarray(prompts, dtype="int64") + lengths, lengths, columns)


def same(found: TrainBatch, expected: TrainBatch) -> bool:
    """Compare dtypes and bits, also of nan."""
    assert found.columns.keys() == expected.columns.keys()
    return all(
        values.dtype == expected.columns[name].dtype and values.tobytes() == expected.columns[name].tobytes()
        for name, values in found.columns.items()
    )


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=20),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_the_parts_joined_are_the_batch(
    lengths: list[tuple[int, int]], num_ranks: int, balance: bool, fractions: bool
) -> None:
    prompts, responses = [list(each) for each in zip(*lengths, strict=True)]
    batch = batch_of(prompts, responses, fractions=fractions)
    steps = 2 if len(batch) % 2 == 0 else 1
    plans = plan_steps(
        batch.total_lengths_N.tolist(),
        num_steps=steps,
        dp_size=num_ranks,
        max_tokens=9,
        micro_batch_size=1,
        balance=balance,
    )
    parts = pickle.loads(pickle.dumps(rank_batches(batch, plans)))
    back = joined([part.own.columns for part in parts], parts[0].rows, [part.own_rows_M for part in parts])
    assert same(back, batch)
    if num_ranks > 1 and len(batch) > 1:
        turned = [parts[1], parts[0], *parts[2:]]
        wrong = [part.own_rows_M for part in turned]
        if len(parts[0].own_rows_M) == len(parts[1].own_rows_M) > 0 and len(set(batch.total_lengths_N)) == 1:
            swapped = joined([part.own.columns for part in parts], parts[0].rows, wrong)
            assert not same(swapped, batch), "control: the rows of another rank"
    for part in parts:
        for number, (step, plan) in enumerate(zip(part.steps, plans, strict=True)):
            planned = [[part.own_rows_M[row] for row in rows] for rows in step.micro_batches]
            assert planned == plan.micro_batches[part.rank], "the rows of the plan, by their numbers in the part"
            assert (part.step_N[plan.rows] == number).all()
            assert step.num_tokens == batch.total_lengths_N[plan.rows].sum()


def test_a_token_travels_in_few_bytes() -> None:
    batch = batch_of([0] * 64, [500] * 64)
    plans = plan_steps([500] * 64, num_steps=1, dp_size=8, max_tokens=None, micro_batch_size=1)
    part = rank_batches(batch.without("routed_experts"), plans)[3]
    assert {name: str(values.dtype) for name, values in part.per_token.items()} == {
        "tokens": "int32",
        "loss_mask": "bool",
        "rollout_log_probs": "float32",
        "policy_versions": "int8",
    }
    own_tokens = 64 * 500 // 8
    assert sum(values.nbytes for values in part.per_token.values()) == 10 * own_tokens
    assert part.num_bytes - 10 * own_tokens < 64 * 64, "a row of another rank takes some bytes, its tokens none"
    routes = rank_batches(batch, plans)[0].per_token["routed_experts"]
    assert routes.dtype == np.int8 and routes.shape == (own_tokens, *ROUTES)


def test_response_columns_arrive_in_their_declared_dtypes() -> None:
    batch = batch_of([2, 2], [3, 4])
    [part] = rank_batches(batch, plan_steps([5, 6], num_steps=1, dp_size=1, max_tokens=None, micro_batch_size=2))
    for name, values in part.own.columns.items():
        if COLUMNS[name].axis is not Axis.TOKEN:
            assert str(values.dtype) == COLUMNS[name].dtype, name


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], "uint8"),
        ([0, 256], "int16"),
        ([0, 65_535], "uint16"),
        ([0, 65_536], "int32"),
        ([0, 2**31], "uint32"),
        ([0, 2**32], "int64"),
        ([-1, 127], "int8"),
        ([-1, 128], "int16"),
        ([-1, 2**31], "int64"),
        ([0.0, 1.0], "bool"),
        ([-0.0, 1.0], "float64"),
        ([0.0, float("nan")], "float64"),
        ([0.0] * 100 + [0.5], "float64"),
    ],
)
def test_the_smallest_dtype_is_exact(values: list[float], dtype: str) -> None:
    column = np.asarray(values)
    small = column.astype(smallest_dtype(column))
    assert str(small.dtype) == dtype
    assert small.astype(column.dtype).tobytes() == column.tobytes()
