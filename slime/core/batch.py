"""TrainBatch: the columns that training reads, one declaration a column.

Path: made from kept Samples by `from_samples`, handed to every trainer as plain numpy (zero-copy through Ray),
cut into micro-batches by `core.packing` and packed by `megatron.microbatch`. Invariant: every column that is
present covers all rows (optional columns are all or none), ragged ones lie flat, row after row.

Shape legend: _N rows (samples), _T all tokens of all rows, _R all response tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime.core.sample import Sample

Array = NDArray[Any]


class Axis(Enum):
    """What a column has one entry for."""

    SAMPLE = "sample"
    TOKEN = "token"
    RESPONSE = "response token"


@dataclass(frozen=True)
class Column:
    """One column: its axis, dtype, and the value that stands where padding is packed in."""

    axis: Axis
    dtype: str
    padding: float
    required: bool
    meaning: str
    num_dims: int = 1
    """Of its array; entries of more than one number have their own shape behind the axis."""


COLUMNS: Mapping[str, Column] = {
    "tokens": Column(Axis.TOKEN, "int64", 0, True, "prompt and response tokens"),
    "loss_mask": Column(Axis.RESPONSE, "float32", 0, True, "1 where a response token counts in the loss"),
    "rewards": Column(Axis.SAMPLE, "float32", 0, True, "raw reward; nan where it failed"),
    "group_indices": Column(Axis.SAMPLE, "int64", -1, True, "samples of one prompt share it"),
    "sample_indices": Column(Axis.SAMPLE, "int64", -1, True, "the sample's number over the run, for messages"),
    "routed_experts": Column(
        Axis.TOKEN, "int32", -1, False, "[layers of experts, chosen] the engine's experts; -1: the router decides", 3
    ),
    "rollout_log_probs": Column(Axis.RESPONSE, "float32", 0, False, "the engine's log-prob at generation"),
    "policy_versions": Column(Axis.RESPONSE, "int32", -1, False, "policy version that made the token"),
    "offpolicy": Column(Axis.RESPONSE, "bool", 0, False, "older weights than the trainer's made the token"),
    "weighed": Column(Axis.RESPONSE, "bool", 0, False, "the token takes an importance weight in the loss"),
    "log_probs": Column(Axis.RESPONSE, "float32", 0, False, "old policy's log-prob, by the trainer"),
    "ref_log_probs": Column(Axis.RESPONSE, "float32", 0, False, "reference policy's log-prob"),
    "values": Column(Axis.RESPONSE, "float32", 0, False, "critic's value of the state before the token"),
    "returns": Column(Axis.RESPONSE, "float32", 0, False, "what the critic learns: advantage + value"),
    "advantages": Column(Axis.RESPONSE, "float32", 0, False, "advantage of each response token"),
    "loss_weights": Column(Axis.RESPONSE, "float32", 0, False, "weight in the step's loss; sums to 1 over the step"),
}


@dataclass
class TrainBatch:
    """Rows of one rollout. `columns[name]` is flat: [N], [T] or [R] by its axis."""

    total_lengths_N: Array
    response_lengths_N: Array
    columns: dict[str, Array]

    def __post_init__(self) -> None:
        missing = [name for name, column in COLUMNS.items() if column.required and name not in self.columns]
        unknown = [name for name in self.columns if name not in COLUMNS]
        if missing or unknown:
            raise ValueError(f"training columns missing: {missing}, not declared in core.batch.COLUMNS: {unknown}")
        for name, values in self.columns.items():
            self._check_column(name, values)

    def _check_column(self, name: str, values: Array) -> None:
        rows = self._row_sizes(name)
        if values.ndim != COLUMNS[name].num_dims:
            raise ValueError(f"column {name} has {values.ndim} dimensions, not {COLUMNS[name].num_dims}")
        if len(values) != int(rows.sum()):
            raise ValueError(f"column {name} has {len(values)} entries, its rows add up to {int(rows.sum())}")

    def _row_sizes(self, name: str) -> Array:
        axis = COLUMNS[name].axis
        if axis is Axis.SAMPLE:
            return np.ones_like(self.total_lengths_N)
        return self.total_lengths_N if axis is Axis.TOKEN else self.response_lengths_N

    def __len__(self) -> int:
        return len(self.total_lengths_N)

    def has(self, name: str) -> bool:
        return name in self.columns

    def rows(self, name: str) -> list[Array]:
        """The column as one array a row (views)."""
        ends = np.cumsum(self._row_sizes(name))
        return np.split(self.columns[name], ends[:-1])

    def select(self, indices: Sequence[int]) -> TrainBatch:
        """The rows `indices`, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        columns: dict[str, Array] = {}
        for name, values in self.columns.items():
            rows = self.rows(name)
            picked: list[Array] = [rows[int(i)] for i in index]
            columns[name] = np.concatenate(picked) if picked else values[:0]
        return TrainBatch(self.total_lengths_N[index], self.response_lengths_N[index], columns)

    def without(self, name: str) -> TrainBatch:
        """The same rows without a column that not all of them need to have."""
        assert not COLUMNS[name].required
        columns = {key: values for key, values in self.columns.items() if key != name}
        return TrainBatch(self.total_lengths_N, self.response_lengths_N, columns)

    def with_column(self, name: str, values: Array) -> TrainBatch:
        """The same rows and one more column (or another value of it)."""
        return TrainBatch(
            self.total_lengths_N,
            self.response_lengths_N,
            {**self.columns, name: np.asarray(values, dtype=COLUMNS[name].dtype)},
        )


def _ragged(name: str, rows: Sequence[Sequence[float]]) -> Array:
    flat = [value for row in rows for value in row]
    return np.asarray(flat, dtype=COLUMNS[name].dtype)


def _routes(samples: Sequence[Sample]) -> Array | None:
    """The experts of every token; None where no sample has any.

    An engine routed all tokens but a sample's last, and none of a sample that has no response.
    """
    shapes = {s.routed_experts.shape[1:] for s in samples if s.routed_experts is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"samples carry routed_experts of different [layers, experts]: {sorted(shapes)}")
    column = COLUMNS["routed_experts"]
    flat = np.full((sum(len(s.tokens) for s in samples), *shapes.pop()), int(column.padding), dtype=column.dtype)
    start = 0
    for sample in samples:
        if sample.routed_experts is not None:
            flat[start : start + len(sample.routed_experts)] = sample.routed_experts
        elif sample.response_length:
            raise ValueError(f"sample {sample.index} carries no routed_experts, which others do: all or none have to")
        start += len(sample.tokens)
    return flat


def from_samples(samples: Sequence[Sample], reward_key: str | None = None) -> TrainBatch:
    """Columns of `samples`, in order.

    A failed reward becomes nan: the advantage estimator leaves that sample out of baseline and loss.

    Raises:
        ValueError: a sample's per-token fields disagree, or an optional field is there for some samples only.
    """
    if not samples:
        raise ValueError("no samples to train on")
    for sample in samples:
        sample.check()
        if sample.group_index < 0 or sample.index < 0:
            raise ValueError(
                f"a sample with group_index {sample.group_index} and index {sample.index}: whoever made it has to "
                "keep both from the sample that it was given, or samples of different prompts are taken for one group"
            )
    columns: dict[str, Array] = {
        "tokens": _ragged("tokens", [s.tokens for s in samples]),
        "loss_mask": _ragged("loss_mask", [s.loss_mask or [1] * s.response_length for s in samples]),
        "rewards": np.asarray(
            [float("nan") if s.reward is None else s.reward_value(reward_key) for s in samples], dtype="float32"
        ),
        "group_indices": np.asarray([s.group_index for s in samples], dtype="int64"),
        "sample_indices": np.asarray([s.index for s in samples], dtype="int64"),
    }
    for name in ("rollout_log_probs", "policy_versions"):
        # A sample without a response has no token to carry anything: it neither gives a column nor denies it.
        values = [getattr(s, name) for s in samples if s.response_length]
        present = [v for v in values if v is not None]
        if present and len(present) == len(values):
            columns[name] = _ragged(name, present)
        elif present:
            raise ValueError(f"{len(present)} of {len(values)} samples carry {name}: all or none have to")
    routes = _routes(samples)
    if routes is not None:
        columns["routed_experts"] = routes
    return TrainBatch(
        np.asarray([len(s.tokens) for s in samples], dtype="int64"),
        np.asarray([s.response_length for s in samples], dtype="int64"),
        columns,
    )
