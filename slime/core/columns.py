"""The columns of a training batch: one row of `COLUMNS` declares everything about a column.

- Used by: `sample` derives its per-token fields from the table, `batch` makes and checks the columns, and
  `megatron.step` passes them to the loss.
- Invariant: nothing else lists columns. A new per-token field is a field of `Sample` and a row here; packing, the cut
  into micro-batches and `LossInputs.columns` carry it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Axis(Enum):
    """The axis along which a column has one entry."""

    SAMPLE = "sample"
    TOKEN = "token"
    RESPONSE = "response token"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: where its values come from, how they are stored, and who reads them."""

    axis: Axis
    dtype: str
    meaning: str
    """A few words for error messages and for readers of the table."""
    padding: float = 0
    """The value of the entries that pad a micro-batch."""
    required: bool = False
    num_dims: int = 1
    """The number of dimensions of its array. Entries of more than one number have their own axes after the first."""
    sample_field: str | None = None
    """The field of `Sample` that it is made from; None for `rewards` and for columns that training computes."""
    if_absent: float | None = None
    """The entries of a sample whose field is None. Unset: all samples with a response have the field, or none."""
    loss_input: bool = False
    """Whether `LossInputs` has a field of its own for it: the column's name with the suffix `_R`."""


COLUMNS: Mapping[str, Column] = {
    "tokens": Column(
        axis=Axis.TOKEN, dtype="int64", required=True, sample_field="tokens", meaning="prompt and response tokens"
    ),
    "loss_mask": Column(
        axis=Axis.RESPONSE,
        dtype="float32",
        required=True,
        sample_field="loss_mask",
        if_absent=1,
        loss_input=True,
        meaning="1 for a response token that counts in the loss",
    ),
    "rewards": Column(axis=Axis.SAMPLE, dtype="float32", required=True, meaning="raw reward; nan if the reward failed"),
    "group_indices": Column(
        axis=Axis.SAMPLE,
        dtype="int64",
        padding=-1,
        required=True,
        sample_field="group_index",
        meaning="number of the group; samples of one prompt share it",
    ),
    "sample_indices": Column(
        axis=Axis.SAMPLE,
        dtype="int64",
        padding=-1,
        required=True,
        sample_field="index",
        meaning="number of the sample in the whole run, for messages",
    ),
    "routed_experts": Column(
        axis=Axis.TOKEN,
        dtype="int8",  # the least: with more than 128 experts the samples have int16, and so has the column
        padding=-1,
        num_dims=3,
        sample_field="routed_experts",
        meaning="[MoE layers, topk] the engine's experts; -1: the trainer's router chooses",
    ),
    "rollout_log_probs": Column(
        axis=Axis.RESPONSE,
        dtype="float32",
        sample_field="rollout_log_probs",
        loss_input=True,
        meaning="the engine's log-prob at generation",
    ),
    "policy_versions": Column(
        axis=Axis.RESPONSE,
        dtype="int32",
        padding=-1,
        sample_field="policy_versions",
        meaning="policy version that sampled the token",
    ),
    "offpolicy": Column(
        axis=Axis.RESPONSE, dtype="bool", meaning="the token was sampled with older weights than the trainer's"
    ),
    "weighted": Column(
        axis=Axis.RESPONSE,
        dtype="bool",
        loss_input=True,
        meaning="the token takes an importance weight in the loss",
    ),
    "old_log_probs": Column(
        axis=Axis.RESPONSE,
        dtype="float32",
        loss_input=True,
        meaning="log-prob under the old policy, by the trainer",
    ),
    "ref_log_probs": Column(
        axis=Axis.RESPONSE, dtype="float32", loss_input=True, meaning="log-prob under the reference model"
    ),
    "values": Column(axis=Axis.RESPONSE, dtype="float32", meaning="the critic's value of the state before the token"),
    "returns": Column(axis=Axis.RESPONSE, dtype="float32", meaning="the critic's target: advantage + value"),
    "advantages": Column(
        axis=Axis.RESPONSE, dtype="float32", loss_input=True, meaning="advantage of each response token"
    ),
    "loss_weights": Column(axis=Axis.RESPONSE, dtype="float32", meaning="weight in the loss; those of a step sum to 1"),
}

PER_TOKEN = tuple(
    column.sample_field for column in COLUMNS.values() if column.axis is Axis.RESPONSE and column.sample_field
)
"""The fields of Sample that, when present, have one entry for each response token."""


def routes_dtype(num_experts: int) -> np.dtype[np.signedinteger[Any]]:
    """Return the dtype of `routed_experts`: the smallest that holds every expert's number and -1.

    >>> routes_dtype(128), routes_dtype(129)
    (dtype('int8'), dtype('int16'))
    """
    return np.dtype(np.int8) if num_experts <= 128 else np.dtype(np.int16)


def widened(name: str, values: Array) -> Array:
    """Return a column, which may have travelled in a smaller dtype, at least as wide as it is declared."""
    return np.asarray(values, dtype=np.promote_types(values.dtype, COLUMNS[name].dtype))


def with_declared_dtypes(columns: Mapping[str, Array]) -> dict[str, Array]:
    """Return the columns in their declared dtypes; an array that has it already is not copied."""
    return {name: np.asarray(values, dtype=COLUMNS[name].dtype) for name, values in columns.items()}
