"""Share: one rank's part of a rollout, and what the data-parallel ranks tell each other about theirs.

- Used by: `trainer` makes one for each rollout; everything that turns columns into others reads the own rows from it
  and asks it for what concerns all rows.
- Invariant: all answers have the same bits on every rank and in every layout. Integers are added exactly. Floats are
  added within a row by the rank that has the row, and over rows in the order of the rows, by every rank alike.

The exchange goes over the hosts (gloo), so no rank waits for its device. All methods that are marked collective must be
called by every rank of the data-parallel group, in the same order.

Shapes: _N rows of the rollout, _M the rank's own rows, _R their response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.core.batch import RowColumns, TrainBatch
from slime.core.columns import Array
from slime.core.packing import StepPlan
from slime.core.rank_batch import RankBatch, entries_of_rows, joined, rank_batches


@dataclass(frozen=True)
class Share:
    """One rank's part of a rollout, among the other ranks."""

    batch: RankBatch
    group: dist.ProcessGroup | None
    """The data-parallel ranks, on the host; None if one rank has all rows."""

    @classmethod
    def alone(cls, batch: TrainBatch) -> Share:
        """Return the share of a rank that has all rows, in one step."""
        [whole] = rank_batches(batch, [StepPlan([[list(range(len(batch)))]])])
        return cls(whole, None)

    @property
    def rows(self) -> RowColumns:
        """All rows of the rollout, with the columns that have one entry a row."""
        return self.batch.rows

    @property
    def own(self) -> TrainBatch:
        """The own rows, with all columns as they came."""
        return self.batch.own

    @property
    def rows_M(self) -> Array:
        """The own rows, as indices into all rows, ascending."""
        return self.batch.own_rows_M

    def totals(self, *counts: float) -> list[float]:
        """Return the sums of integers over all ranks. Collective."""
        return self._reduced(counts, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over all ranks. Collective."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(numbers, op=op, group=self.group)
        return numbers.tolist()

    def all_rows(self, values_M: Tensor) -> Tensor:
        """Return [N] float64: the number of every row, from each rank's own. Collective.

        Every row has a number on one rank and 0 on the others, so adding them up changes no bit.
        """
        values_N = torch.zeros(len(self.rows), dtype=torch.float64)
        values_N[torch.from_numpy(self.rows_M)] = values_M.double()
        if self.group is not None:
            dist.all_reduce(values_N, group=self.group)
        return values_N

    def gathered(self, own: Any) -> list[Any]:
        """Return what each rank passes in, in the order of the ranks. Collective, and slow: for messages and dumps."""
        if self.group is None:
            return [own]
        found: list[Any] = [None] * self.group.size()
        dist.all_gather_object(found, own, group=self.group)
        return found

    def whole(self, columns: Mapping[str, Array]) -> TrainBatch:
        """Return the rollout with these columns, of which each rank passes in its own rows. Collective.

        It takes the time and the memory of the whole rollout on every rank: for a user's hook, and for dumps.
        """
        parts = self.gathered(dict(columns))
        return joined(parts, self.rows, self.gathered(self.rows_M))

    def own_part(self, values_R: Array) -> Array:
        """Return the own rows' entries of a response column of the whole rollout."""
        return entries_of_rows(values_R, self.rows.response_lengths_N, self.rows_M)

    def places(self, responses_R: Array) -> Array:
        """Turn indices into the own flat response columns into indices into those of the whole rollout."""
        lengths_N, lengths_M = self.rows.response_lengths_N, self.own.response_lengths_N
        starts_M = (np.cumsum(lengths_N) - lengths_N)[self.rows_M]
        own_ends_M = np.cumsum(lengths_M)
        row_R = np.searchsorted(own_ends_M, responses_R, side="right")
        return responses_R + (starts_M - (own_ends_M - lengths_M))[row_R]
