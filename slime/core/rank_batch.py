"""RankBatch: the part of a rollout that one data-parallel rank trains on, as it travels to the rank's trainers.

- Made from: a TrainBatch and its plan, by `rank_batches`, in the rollout manager. Each data-parallel rank gets one
  object; its tensor-, pipeline- and context-parallel ranks share it.
- Invariant: a rank holds the tokens of its own rows only. Of the other rows it knows what has one number a row: lengths
  and the columns of `Axis.SAMPLE`. Joined, the parts of all ranks are the batch again, to the bit.

A rank's size is so many bytes for each of its own tokens, and about 40 for each row of the rollout. On the way a column
has the smallest dtype that holds it: a token takes 4 bytes, a mask of 0 and 1 takes 1, a policy version 1 or 2, a
log-prob 4.

Shapes: _N rows of the rollout, _M rows of the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from slime.core.batch import RowColumns, TrainBatch
from slime.core.columns import COLUMNS, Array, Axis, widened
from slime.core.packing import StepPlan


@dataclass(frozen=True)
class RankStep:
    """A rank's part of one optimizer step."""

    micro_batches: Sequence[Sequence[int]]
    """The rows of each micro-batch, as indices into the rank's own rows."""
    num_tokens: int
    """The tokens of the whole step, on all ranks, without padding."""


@dataclass
class RankBatch:
    """One rank's rows of a rollout, its part of each step, and what has one number a row of the whole rollout.

    Example: three rows, of which rank 0 gets the rows 0 and 2 and rank 1 gets row 1.

    >>> columns = {
    ...     "tokens": np.asarray([7, 1, 7, 2, 8, 3]),
    ...     "loss_mask": np.asarray([1, 0, 1], dtype="float32"),
    ...     "rewards": np.asarray([1, 0, 1], dtype="float32"),
    ...     "group_indices": np.asarray([0, 0, 1]),
    ...     "sample_indices": np.asarray([0, 1, 2]),
    ... }
    >>> batch = TrainBatch(np.asarray([2, 2, 2]), np.asarray([1, 1, 1]), columns)
    >>> first, second = rank_batches(batch, [StepPlan([[[0, 2]], [[1]]])])
    >>> first.own.columns["tokens"].tolist(), second.own.columns["tokens"].tolist()
    ([7, 1, 8, 3], [7, 2])
    >>> first.own_rows_M.tolist(), first.rows.columns["rewards"].tolist()
    ([0, 2], [1.0, 0.0, 1.0])
    >>> first.steps
    [RankStep(micro_batches=[[0, 1]], num_tokens=6)]
    """

    rank: int
    """The data-parallel rank."""
    num_ranks: int
    rows: RowColumns
    """All rows of the rollout."""
    own_rows_M: Array
    """int64, ascending: the own rows, as indices into `rows`."""
    per_token: dict[str, Array]
    """The columns of `Axis.TOKEN` and `Axis.RESPONSE` of the own rows, each in the smallest dtype that holds it."""
    steps: list[RankStep]
    step_N: Array
    """int64: the step that each row belongs to."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Metrics of the plan: `train/...`."""

    @cached_property
    def own(self) -> TrainBatch:
        """The own rows as a batch. Response columns have their declared dtypes; those of all tokens stay as small."""
        own = {name: values[self.own_rows_M] for name, values in self.rows.columns.items()}
        for name, values in self.per_token.items():
            whole = COLUMNS[name].axis is Axis.RESPONSE
            own[name] = widened(name, values) if whole else values
        return TrainBatch(
            self.rows.total_lengths_N[self.own_rows_M], self.rows.response_lengths_N[self.own_rows_M], own
        )

    @property
    def num_bytes(self) -> int:
        """The size of all arrays."""
        arrays = [*self.per_token.values(), *self.rows.columns.values(), self.own_rows_M, self.step_N]
        arrays += [self.rows.total_lengths_N, self.rows.response_lengths_N]
        return sum(array.nbytes for array in arrays)


def rank_batches(
    batch: TrainBatch, plans: Sequence[StepPlan], metrics: Mapping[str, float] | None = None
) -> list[RankBatch]:
    """Cut a rollout as `plans` say: one part for each data-parallel rank. `metrics` go to every rank."""
    rows = RowColumns(batch.total_lengths_N, batch.response_lengths_N, batch.of_rows())
    dealt = [_rows_of(plans, rank) for rank in range(len(plans[0].micro_batches))]
    step_N = np.empty(len(batch), dtype=np.int64)
    sizes: list[int] = []
    for number, plan in enumerate(plans):
        step_N[plan.rows] = number
        sizes.append(int(batch.total_lengths_N[plan.rows].sum()))
    per_token = [dict[str, Array]() for _ in dealt]
    for name, values in batch.columns.items():
        if name not in rows.columns:
            for rank, part in enumerate(_cut(values, batch.row_sizes(name), dealt)):
                per_token[rank][name] = part
    return [
        RankBatch(
            rank,
            len(dealt),
            rows,
            own,
            per_token[rank],
            [_step(plan, rank, own, size) for plan, size in zip(plans, sizes, strict=True)],
            step_N,
            dict(metrics or {}),
        )
        for rank, own in enumerate(dealt)
    ]


def _rows_of(plans: Sequence[StepPlan], rank: int) -> Array:
    rows = [row for plan in plans for micro_batch in plan.micro_batches[rank] for row in micro_batch]
    return np.sort(np.asarray(rows, dtype=np.int64))


def _step(plan: StepPlan, rank: int, own_M: Array, size: int) -> RankStep:
    """Number the rows of the rank's micro-batches within the rank."""
    return RankStep([np.searchsorted(own_M, rows).tolist() for rows in plan.micro_batches[rank]], size)


def _cut(values: Array, sizes_N: Array, dealt: Sequence[Array]) -> list[Array]:
    """Return each rank's rows of a column, in the smallest dtype that holds the column."""
    small = smallest_dtype(values)
    return [entries_of_rows(values, sizes_N, rows_M, dtype=small) for rows_M in dealt]


def entries_of_rows(values: Array, sizes_N: Array, rows_M: Array, *, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the entries of the rows `rows_M`, ascending, of a flat column, in its own dtype or in `dtype`.

    Neighbours are copied at once.

    >>> entries_of_rows(np.asarray([1, 1, 2, 3, 3]), np.asarray([2, 1, 2]), np.asarray([0, 2])).tolist()
    [1, 1, 3, 3]
    """
    ends_N = np.cumsum(sizes_N)
    starts_N = ends_N - sizes_N
    breaks = np.flatnonzero(np.diff(rows_M) != 1) + 1
    firsts = rows_M[np.concatenate([[0], breaks])] if len(rows_M) else rows_M
    lasts = rows_M[np.concatenate([breaks - 1, [-1]])] if len(rows_M) else rows_M
    runs = [values[a:b] for a, b in zip(starts_N[firsts].tolist(), ends_N[lasts].tolist(), strict=True)]
    return np.concatenate([values[:0], *runs], dtype=values.dtype if dtype is None else dtype, casting="unsafe")


def smallest_dtype(values: Array) -> np.dtype:
    """Return the smallest dtype that holds the column's values exactly: bool if all are 0 or 1, else by their range.

    A column of other numbers than integers, 0 and 1 keeps its dtype.

    >>> [str(smallest_dtype(np.asarray(values))) for values in ([1.0, 0.0], [1.0, 0.5], [7, 300], [-1, 127], [-1, 128])]
    ['bool', 'float64', 'int16', 'int8', 'int16']
    """
    if values.dtype == np.bool_ or not values.size:
        return values.dtype
    if values.dtype.kind == "f":
        # most columns of floats are log-probs: their first entries show it
        is_mask = all(((part == 0) | (part == 1)).all() for part in (values[:64], values))
        return np.dtype(np.bool_) if is_mask and not np.signbit(values).any() else values.dtype
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 1:
        return np.dtype(np.bool_)
    kinds = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32)
    return next((np.dtype(k) for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), values.dtype)


def joined(parts: Sequence[Mapping[str, Array]], rows: RowColumns, rows_of_ranks: Sequence[Array]) -> TrainBatch:
    """Undo the cut: return the rollout from its rows and each rank's columns (`Axis.SAMPLE` ones of its own rows)."""
    order = np.concatenate(list(rows_of_ranks))
    places = np.argsort(order, kind="stable")
    lengths = {Axis.TOKEN: rows.total_lengths_N, Axis.RESPONSE: rows.response_lengths_N}
    columns: dict[str, Array] = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        axis = COLUMNS[name].axis
        sizes = np.ones_like(rows.total_lengths_N) if axis is Axis.SAMPLE else lengths[axis]
        ends = np.cumsum(sizes[order])
        starts = ends - sizes[order]
        values = np.concatenate([values[:0], *(values[starts[p] : ends[p]] for p in places)])
        columns[name] = widened(name, values)
    return TrainBatch(rows.total_lengths_N, rows.response_lengths_N, columns)
