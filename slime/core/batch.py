"""TrainBatch: the columns that training reads, as `core.columns` declares them.

- Made from: the kept Samples, by `from_samples`. Every trainer gets it as plain numpy arrays (zero-copy through Ray),
  `core.packing` plans its micro-batches and `megatron.microbatch` packs them.
- Invariant: every column covers all rows (an optional column exists for all samples or for none), and ragged columns
  are flat, one row after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime.core.columns import COLUMNS, Array, Axis, Column, with_declared_dtypes
from slime.core.sample import Sample


@dataclass
class RowColumns:
    """The rows of one rollout, with columns that have one entry a row (`Axis.SAMPLE`): [N]."""

    total_lengths_N: Array
    response_lengths_N: Array
    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(self.total_lengths_N)

    def has(self, name: str) -> bool:
        """Return whether the column `name` exists."""
        return name in self.columns


@dataclass
class TrainBatch(RowColumns):
    """The rows of one rollout with all columns. `columns[name]` is flat: [N], [T] or [R], by the column's axis.

    Example: two samples of one prompt (tokens 7, 8), one with two response tokens and one with a single one, so N = 2,
    T = 4 + 3 = 7 and R = 2 + 1 = 3.

    >>> from slime.core.sample import Sample
    >>> samples = [
    ...     Sample(group_index=0, index=0, tokens=[7, 8, 1, 2], prompt_length=2, response_length=2, reward=1.0),
    ...     Sample(group_index=0, index=1, tokens=[7, 8, 3], prompt_length=2, response_length=1, loss_mask=[0]),
    ... ]
    >>> batch = from_samples(samples)
    >>> batch.total_lengths_N.tolist(), batch.response_lengths_N.tolist()
    ([4, 3], [2, 1])
    >>> batch.columns["tokens"].tolist()
    [7, 8, 1, 2, 7, 8, 3]
    >>> batch.columns["loss_mask"].tolist()
    [1.0, 1.0, 0.0]
    >>> batch.columns["rewards"].tolist()
    [1.0, nan]
    >>> [row.tolist() for row in batch.rows("tokens")]
    [[7, 8, 1, 2], [7, 8, 3]]
    >>> batch.select([1]).columns["tokens"].tolist()
    [7, 8, 3]
    """

    def __post_init__(self) -> None:
        missing = [name for name, column in COLUMNS.items() if column.required and name not in self.columns]
        unknown = [name for name in self.columns if name not in COLUMNS]
        if missing or unknown:
            raise ValueError(f"training columns missing: {missing}, not declared in core.columns.COLUMNS: {unknown}")
        for name, values in self.columns.items():
            self._check_column(name, values)

    def _check_column(self, name: str, values: Array) -> None:
        rows = self.row_sizes(name)
        if values.ndim != COLUMNS[name].num_dims:
            raise ValueError(f"column {name} has {values.ndim} dimensions, not {COLUMNS[name].num_dims}")
        if len(values) != int(rows.sum()):
            raise ValueError(f"column {name} has {len(values)} entries, its rows add up to {int(rows.sum())}")

    def row_sizes(self, name: str) -> Array:
        """Return the number of entries that each row has in the column, [N]."""
        axis = COLUMNS[name].axis
        if axis is Axis.SAMPLE:
            return np.ones_like(self.total_lengths_N)
        return self.total_lengths_N if axis is Axis.TOKEN else self.response_lengths_N

    def of_rows(self) -> dict[str, Array]:
        """Return the columns that have one entry a row."""
        return {name: values for name, values in self.columns.items() if COLUMNS[name].axis is Axis.SAMPLE}

    def rows(self, name: str) -> list[Array]:
        """Return the column as one array for each row (views)."""
        ends = np.cumsum(self.row_sizes(name))
        return np.split(self.columns[name], ends[:-1])

    def select(self, indices: Sequence[int]) -> TrainBatch:
        """Return the rows `indices`, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        columns: dict[str, Array] = {}
        for name, values in self.columns.items():
            rows = self.rows(name)
            picked: list[Array] = [rows[int(i)] for i in index]
            columns[name] = np.concatenate(picked) if picked else values[:0]
        return TrainBatch(self.total_lengths_N[index], self.response_lengths_N[index], columns)

    def without(self, name: str) -> TrainBatch:
        """Return the batch without one optional column."""
        assert not COLUMNS[name].required
        columns = {key: values for key, values in self.columns.items() if key != name}
        return TrainBatch(self.total_lengths_N, self.response_lengths_N, columns)

    def with_column(self, name: str, values: Array) -> TrainBatch:
        """Return the batch with one more column, or with new values for a column that it has."""
        columns = self.columns | with_declared_dtypes({name: values})
        return TrainBatch(self.total_lengths_N, self.response_lengths_N, columns)


def _from_field(field: str, column: Column, samples: Sequence[Sample]) -> Array | None:
    """Return the column that is made from a field of Sample; None if it is optional and no sample has it."""
    if column.num_dims > 1:
        return _routes(samples)
    if column.axis is Axis.SAMPLE:
        return np.asarray([getattr(sample, field) for sample in samples], dtype=column.dtype)
    rows = [sample.array(field) for sample in samples]
    sizes = [sample.num_tokens if column.axis is Axis.TOKEN else sample.response_length for sample in samples]
    if column.if_absent is None and column.axis is Axis.RESPONSE:
        # A sample without a response has no tokens, so the column may exist without it.
        have = [row is not None for row, size in zip(rows, sizes, strict=True) if size]
        if not any(have):
            return None
        if not all(have):
            raise ValueError(f"{sum(have)} of {len(have)} samples have {field}: all or none must have it")
    flat = np.empty(sum(sizes), dtype=column.dtype)
    start = 0
    for row, size in zip(rows, sizes, strict=True):
        if size:
            flat[start : start + size] = column.if_absent if row is None else row
        start += size
    return flat


def _routes(samples: Sequence[Sample]) -> Array | None:
    """Return the experts of every token as one column; None when no sample has any.

    An engine routes all tokens of a sample but the last one, and none when the sample has no response.
    """
    shapes = {s.routed_experts.shape[1:] for s in samples if s.routed_experts is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"samples have routed_experts of different [layers, experts]: {sorted(shapes)}")
    column = COLUMNS["routed_experts"]
    dtype = np.result_type(column.dtype, *{s.routed_experts.dtype for s in samples if s.routed_experts is not None})
    flat = np.full((sum(s.num_tokens for s in samples), *shapes.pop()), int(column.padding), dtype=dtype)
    start = 0
    for sample in samples:
        if sample.routed_experts is not None:
            flat[start : start + len(sample.routed_experts)] = sample.routed_experts
        elif sample.response_length:
            raise ValueError(f"sample {sample.index} has no routed_experts, but others do: all or none must have them")
        start += sample.num_tokens
    return flat


def from_samples(samples: Sequence[Sample], reward_key: str | None = None) -> TrainBatch:
    """Turn samples into the columns of a TrainBatch, in order.

    A failed reward becomes nan; the advantage estimator then leaves that sample out of the baseline and the loss.

    Raises:
        ValueError: a sample's per-token fields disagree in length or hold what is no number, or an optional field is
            present in some samples only.
    """
    if not samples:
        raise ValueError("no samples to train on")
    for sample in samples:
        sample.check()
        if sample.group_index < 0 or sample.index < 0:
            raise ValueError(
                f"a sample has group_index {sample.group_index} and index {sample.index}: the function that made it "
                "must copy both from the sample that it was given, or samples of different prompts would form one group"
            )
    rewards = [float("nan") if s.reward is None else s.reward_value(reward_key) for s in samples]
    columns = with_declared_dtypes({"rewards": np.asarray(rewards, dtype="float64")})
    for name, column in COLUMNS.items():
        values = None if column.sample_field is None else _from_field(column.sample_field, column, samples)
        if values is not None:
            columns[name] = values
    return TrainBatch(
        np.asarray([s.num_tokens for s in samples], dtype="int64"),
        np.asarray([s.response_length for s in samples], dtype="int64"),
        columns,
    )
