"""The guard of a step: it finds numbers that are not finite, and spikes of the loss, before a weight changes.

- Used by: `trainer` checks a rollout's columns before the steps; `step` checks each step's losses, log-probs and
  gradient before the optimizer takes it.
- Invariant: all ranks reach the same result, with the same message, which names samples.

A column that is not finite (a reward, a log-prob, an advantage) always ends the run, because an engine, a reward
function or the weights are broken. A step that is not finite, or a spike with --check-for-spiky-loss, ends the run too;
with --bad-step-action skip such a step is skipped instead.

Shapes: _N samples, _R response tokens.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.core.columns import COLUMNS, Array, Axis
from slime.megatron.parallel import Topology

logger = logging.getLogger(__name__)

HISTORY_STEPS, FEWEST_STEPS = 100, 10
"""A step is compared with the largest value of the last HISTORY_STEPS steps, if there are at least FEWEST_STEPS."""
MOST_SKIPPED = 10
"""The number of consecutive steps that may be skipped; after that the weights themselves must be broken."""
MOST_NAMED = 4

WATCHED: Mapping[str, str] = {"loss_magnitude": "the mean of |loss| over tokens", "grad_norm": "the gradient norm"}
"""The values that may spike. The loss itself is not one: a policy-gradient loss is near 0 and has either sign."""


class BadStepError(RuntimeError):
    """Raised for a step that was not taken: no weight has changed, on any rank."""


@dataclass(frozen=True)
class TokenTrace:
    """A step's values for the response tokens of one micro-batch, on this rank of the last stage."""

    responses_R: Array
    """Each token's index in the whole batch's flat columns."""
    log_probs_R: Tensor
    loss_R: Tensor
    weights_R: Tensor

    def not_finite(self) -> Tensor:
        """Return [] the number of counted tokens whose log-prob or loss is not finite; nothing waits for it."""
        return _spoilt(self.log_probs_R, self.loss_R, self.weights_R).sum()

    def magnitude(self) -> Tensor:
        """Return [] this micro-batch's share of the mean of |loss|."""
        return (torch.where(self.weights_R > 0, self.loss_R, 0.0).abs() * self.weights_R).sum()


def _spoilt(log_probs_R: Tensor, loss_R: Tensor, weights_R: Tensor) -> Tensor:
    return ~(log_probs_R.isfinite() & loss_R.isfinite()) & (weights_R > 0)


def whole_traces(traces: Sequence[TokenTrace], topology: Topology) -> dict[str, Array]:
    """Gather the step's tokens of all ranks in the whole batch's order: `places`, `log_probs`, `loss`, `weights`.

    Collective over data- and context-parallel ranks; call it on the last stage only.
    """
    own = {
        "places": np.concatenate([trace.responses_R for trace in traces]),
        "log_probs": torch.cat([trace.log_probs_R for trace in traces]).float().cpu().numpy(),
        "loss": torch.cat([trace.loss_R for trace in traces]).float().cpu().numpy(),
        "weights": torch.cat([trace.weights_R for trace in traces]).float().cpu().numpy(),
    }
    parts: list[Any] = [None] * topology.dp_cp_group.size()
    dist.all_gather_object(parts, own, group=topology.dp_cp_group)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in own}
    order = np.argsort(whole["places"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


def check_columns(
    where: str, batch: TrainBatch, columns: Mapping[str, Array], counted_N: Array, names: Sequence[str] | None = None
) -> None:
    """Check that every number that the loss will count is finite.

    Args:
        batch: the rollout, whose samples the message names.
        columns: all columns so far, the batch's own and those that training has made of it.
        names: the columns to check; None: all.

    Raises:
        RuntimeError: one is not; the message names the samples.
    """
    infinite_N = np.isinf(columns["rewards"]) & counted_N  # nan: it failed, and leaves the loss
    if infinite_N.any():
        rows = np.flatnonzero(infinite_N)
        named = _named(batch, rows, [f"{reward:g}" for reward in columns["rewards"][rows]])
        raise RuntimeError(f"{where}: rewards that are not finite: {named}; no weight was changed. The reward is wrong")
    counts_R = (columns["loss_mask"] > 0) & np.repeat(counted_N, batch.response_lengths_N)
    for name, values_R in columns.items():
        column = COLUMNS[name]
        if column.axis is Axis.RESPONSE and column.dtype.startswith("float") and (names is None or name in names):
            places = np.flatnonzero(~np.isfinite(values_R) & counts_R)
            if len(places):
                named = _named_tokens(batch, places, [f"{value:g}" for value in values_R[places]])
                raise RuntimeError(
                    f"{where}: {name} ({column.meaning}) that are not finite: {named}; no weight was changed"
                )


class StepGuard:
    """The history of a run's steps, and the limits for the next one."""

    def __init__(self, args: Args, topology: Topology) -> None:
        self._topology = topology
        self._factor = args.spiky_loss_factor if args.check_for_spiky_loss else None
        self.skips = args.bad_step_action == "skip"
        self._history = {name: deque[float](maxlen=HISTORY_STEPS) for name in WATCHED}
        self._skipped_in_a_row = 0

    def limit(self, name: str) -> float:
        """Return the largest value that a step's `name` of WATCHED may have."""
        values = self._history[name]
        if self._factor is None or len(values) < FEWEST_STEPS or max(values) == 0:
            return math.inf
        return self._factor * max(values)

    def check(
        self, where: str, batch: TrainBatch, metrics: dict[str, float], traces: Sequence[TokenTrace]
    ) -> dict[str, float]:
        """Check a step; return its metrics without those that only the guard reads. Collective if it raises.

        Raises:
            BadStepError: the step is not finite, or spikes; its message is the same on every rank.
        """
        spoilt, magnitude = metrics.pop("not_finite"), metrics.pop("loss_magnitude")
        norm, loss = metrics["grad_norm"], metrics["loss"]
        watched = {"loss_magnitude": magnitude, "grad_norm": norm}
        leaps = [name for name in WATCHED if watched[name] > self.limit(name)]
        if spoilt:
            what = f"the loss is {loss:g}, and the loss or log-prob of {spoilt:.0f} tokens is not finite"
        elif not math.isfinite(norm):
            what = f"the gradient norm is {norm} at a loss of {loss:.6g}; every token's loss is finite"
        elif leaps:
            what = "; ".join(
                f"{WATCHED[name]} is {watched[name]:.6g}, more than {self._factor:g} times the largest of the last "
                f"{len(self._history[name])} steps, {max(self._history[name]):.6g} (--check-for-spiky-loss)"
                for name in leaps
            )
        else:
            for name, value in watched.items():
                self._history[name].append(value)
            self._skipped_in_a_row = 0
            return metrics | ({"skipped_steps": 0.0} if self.skips else {})
        raise BadStepError(f"{where}: {what}. {self._samples(batch, traces, bool(spoilt))}. No weight was changed")

    def skipped(self, error: BadStepError) -> dict[str, float]:
        """Count a step that is skipped, and return its metrics.

        Raises:
            BadStepError: --bad-step-action is stop, or too many consecutive steps have been skipped.
        """
        if not self.skips:
            raise BadStepError(
                f"{error}; resume from the last checkpoint with a lower --lr, or give --bad-step-action skip"
            ) from error
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MOST_SKIPPED:
            raise BadStepError(f"{error}, and the {MOST_SKIPPED} steps before it were skipped already") from error
        if self._topology.rank == 0:
            logger.warning("%s: the step is skipped (--bad-step-action skip)", error)
        return {"skipped_steps": 1.0}

    def _samples(self, batch: TrainBatch, traces: Sequence[TokenTrace], spoilt: bool) -> str:
        """Name the samples with tokens that are not finite, or those with the largest loss; equal on every rank."""
        text = ""
        if self._topology.is_last_stage:
            whole = whole_traces(traces, self._topology)
            text = _spoilt_samples(batch, whole) if spoilt else _largest_samples(batch, whole)
        found = [text]
        dist.broadcast_object_list(found, group=self._topology.pp_group, group_src=self._topology.pp_size - 1)
        return found[0]

    def state_dict(self) -> dict[str, Any]:
        history = {name: list(values) for name, values in self._history.items()}
        return {"history": history, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, values in state["history"].items():
            self._history[name] = deque(values, maxlen=HISTORY_STEPS)
        self._skipped_in_a_row = state["skipped_in_a_row"]


def _spoilt_samples(batch: TrainBatch, whole: Mapping[str, Array]) -> str:
    tensors = [torch.from_numpy(whole[name]) for name in ("log_probs", "loss", "weights")]
    wrong = np.flatnonzero(_spoilt(*tensors).numpy())
    places = whole["places"][wrong]
    descriptions = [
        f"log-prob {log_prob:g}, loss {loss:g}, advantage {advantage:g}"
        for log_prob, loss, advantage in zip(
            whole["log_probs"][wrong], whole["loss"][wrong], batch.columns["advantages"][places], strict=True
        )
    ]
    return f"Not finite in {_named_tokens(batch, places, descriptions)}"


def _largest_samples(batch: TrainBatch, whole: Mapping[str, Array]) -> str:
    sizes = np.abs(np.where(whole["weights"] > 0, whole["loss"], 0)) * whole["weights"]
    sizes_N = np.bincount(_rows_of(batch, whole["places"]), sizes, len(batch))
    largest = np.argsort(-sizes_N, kind="stable")[:MOST_NAMED]
    largest = largest[sizes_N[largest] > 0]
    return (
        "The largest shares of |loss|: "
        f"{_named(batch, largest, [f'{size:.0%}' for size in sizes_N[largest] / sizes_N.sum()])}"
    )


def _rows_of(batch: TrainBatch, places: Array) -> Array:
    """Return the row of each index into the flat response columns."""
    return np.searchsorted(np.cumsum(batch.response_lengths_N), places, side="right")


def _named(batch: TrainBatch, rows: Array, descriptions: Sequence[str]) -> str:
    """Name the samples of these rows, each with its description; samples after the first few are only counted."""
    samples, groups = batch.columns["sample_indices"], batch.columns["group_indices"]
    named = [
        f"sample {samples[row]} of group {groups[row]} ({description})"
        for row, description in zip(rows[:MOST_NAMED], descriptions[:MOST_NAMED], strict=True)
    ]
    more = [f"{len(rows) - MOST_NAMED} more samples"] if len(rows) > MOST_NAMED else []
    return ", ".join([*named, *more])


def _named_tokens(batch: TrainBatch, places: Array, descriptions: Sequence[str]) -> str:
    """Name the samples that have these tokens, with the description of the first token of each."""
    rows, firsts, counts = np.unique(_rows_of(batch, places), return_index=True, return_counts=True)
    starts_N = np.cumsum(batch.response_lengths_N) - batch.response_lengths_N
    described = [
        f"{count} of {batch.response_lengths_N[row]} response tokens, the first is {places[first] - starts_N[row]}: "
        f"{descriptions[first]}"
        for row, first, count in zip(rows, firsts, counts, strict=True)
    ]
    return _named(batch, rows, described)
