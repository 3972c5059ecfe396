"""The guard of a step: it finds numbers that are not finite, and spikes of the loss, before a weight changes.

- Used by: `trainer` checks a rollout's columns before the steps; `step` checks each step's losses, log-probs and
  gradient before the optimizer takes it.
- Invariant: all ranks reach the same result, with the same message, which names samples.

A column that is not finite (a reward, a log-prob, an advantage) always ends the run, because an engine, a reward
function or the weights are broken. A step that is not finite, or a spike with --check-for-spiky-loss, ends the run too;
with --bad-step-action skip such a step is skipped instead.

Shapes: _N samples of the rollout, _M the rank's own samples, _R their response tokens.
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
from slime.core.batch import RowColumns
from slime.core.columns import COLUMNS, Array, Axis
from slime.megatron.parallel import Topology
from slime.megatron.share import Share

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
    """Each token's index in the flat columns of the rank's own rows."""
    log_probs_R: Tensor
    loss_R: Tensor
    weights_R: Tensor
    advantages_R: Tensor

    def not_finite(self) -> Tensor:
        """Return [] the number of counted tokens whose log-prob or loss is not finite; nothing waits for it."""
        return _spoilt(self.log_probs_R, self.loss_R, self.weights_R).sum()

    def magnitude(self) -> Tensor:
        """Return [] this micro-batch's share of the mean of |loss|."""
        return (torch.where(self.weights_R > 0, self.loss_R, 0.0).abs() * self.weights_R).sum()


def _spoilt(log_probs_R: Tensor, loss_R: Tensor, weights_R: Tensor) -> Tensor:
    return ~(log_probs_R.isfinite() & loss_R.isfinite()) & (weights_R > 0)


def whole_traces(traces: Sequence[TokenTrace], topology: Topology, share: Share) -> dict[str, Array]:
    """Gather the step's tokens of all ranks in the rollout's order: `places`, `log_probs`, `loss`, `advantages`, ...

    `places` are indices into the flat response columns of the whole rollout. Collective over data- and context-parallel
    ranks; call it on the last stage only.
    """
    responses_R = np.concatenate([np.empty(0, dtype=np.int64), *(trace.responses_R for trace in traces)])
    own = {
        "places": share.places(responses_R),
        "log_probs": torch.cat([trace.log_probs_R for trace in traces]).float().cpu().numpy(),
        "loss": torch.cat([trace.loss_R for trace in traces]).float().cpu().numpy(),
        "weights": torch.cat([trace.weights_R for trace in traces]).float().cpu().numpy(),
        "advantages": torch.cat([trace.advantages_R for trace in traces]).float().cpu().numpy(),
    }
    parts: list[Any] = [None] * topology.dp_cp_group.size()
    dist.all_gather_object(parts, own, group=topology.dp_cp_group)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in own}
    order = np.argsort(whole["places"], kind="stable")
    return {name: values[order] for name, values in whole.items()}


@dataclass(frozen=True)
class _Fault:
    """The values of one sample that are not finite."""

    row: int
    first: int
    """The first such token of its response."""
    value: float
    count: int


def check_columns(
    where: str, share: Share, columns: Mapping[str, Array], counted_N: Array, names: Sequence[str] | None = None
) -> None:
    """Check that every number that the loss will count is finite. Collective.

    Args:
        share: the rollout, whose samples the message names.
        columns: all columns of the own rows so far, the received ones and the ones that training has computed.
        names: the columns to check; None: all.

    Raises:
        RuntimeError: one is not; the message names the samples, and is the same on every rank.
    """
    rewards_N = share.rows.columns["rewards"]
    infinite_N = np.isinf(rewards_N) & counted_N  # nan: it failed, and leaves the loss
    if infinite_N.any():
        rows = np.flatnonzero(infinite_N)
        named = _named(share.rows, rows, [f"{reward:g}" for reward in rewards_N[rows]])
        raise RuntimeError(f"{where}: rewards that are not finite: {named}; no weight was changed. The reward is wrong")
    lengths_M = share.own.response_lengths_N
    counts_R = (columns["loss_mask"] > 0) & np.repeat(counted_N[share.rows_M], lengths_M)
    faults: dict[str, list[_Fault]] = {}
    for name, values_R in columns.items():
        column = COLUMNS[name]
        if column.axis is Axis.RESPONSE and column.dtype.startswith("float") and (names is None or name in names):
            places = np.flatnonzero(~np.isfinite(values_R) & counts_R)
            if len(places):
                faults[name] = _faults(share, values_R, places)
    if not share.largest(bool(faults))[0]:
        return
    found = share.gathered(faults)
    name = next(name for name in columns if any(name in part for part in found))
    every = sorted((fault for part in found for fault in part.get(name, [])), key=lambda fault: fault.row)
    raise RuntimeError(
        f"{where}: {name} ({COLUMNS[name].meaning}) that are not finite: {_named_faults(share.rows, every)}; "
        "no weight was changed"
    )


def _faults(share: Share, values_R: Array, places: Array) -> list[_Fault]:
    ends_M = np.cumsum(share.own.response_lengths_N)
    owns, firsts, counts = np.unique(
        np.searchsorted(ends_M, places, side="right"), return_index=True, return_counts=True
    )
    starts_M = ends_M - share.own.response_lengths_N
    return [
        _Fault(int(share.rows_M[own]), int(places[first] - starts_M[own]), float(values_R[places[first]]), int(count))
        for own, first, count in zip(owns, firsts, counts, strict=True)
    ]


def _named_faults(rows: RowColumns, faults: Sequence[_Fault]) -> str:
    descriptions = [
        _described(rows, fault.row, fault.count, fault.first, f"{fault.value:g}") for fault in faults[:MOST_NAMED]
    ]
    return _named(rows, np.asarray([fault.row for fault in faults]), descriptions)


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
        self, where: str, share: Share, metrics: dict[str, float], traces: Sequence[TokenTrace]
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
        raise BadStepError(f"{where}: {what}. {self._samples(share, traces, bool(spoilt))}. No weight was changed")

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

    def _samples(self, share: Share, traces: Sequence[TokenTrace], spoilt: bool) -> str:
        """Name the samples with tokens that are not finite, or those with the largest loss; equal on every rank."""
        text = ""
        if self._topology.is_last_stage:
            whole = whole_traces(traces, self._topology, share)
            text = _spoilt_samples(share.rows, whole) if spoilt else _largest_samples(share.rows, whole)
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


def _spoilt_samples(rows: RowColumns, whole: Mapping[str, Array]) -> str:
    tensors = [torch.from_numpy(whole[name]) for name in ("log_probs", "loss", "weights")]
    wrong = np.flatnonzero(_spoilt(*tensors).numpy())
    descriptions = [
        f"log-prob {log_prob:g}, loss {loss:g}, advantage {advantage:g}"
        for log_prob, loss, advantage in zip(
            whole["log_probs"][wrong], whole["loss"][wrong], whole["advantages"][wrong], strict=True
        )
    ]
    return f"Not finite in {_named_tokens(rows, whole['places'][wrong], descriptions)}"


def _largest_samples(rows: RowColumns, whole: Mapping[str, Array]) -> str:
    sizes = np.abs(np.where(whole["weights"] > 0, whole["loss"], 0)) * whole["weights"]
    sizes_N = np.bincount(_rows_of(rows, whole["places"]), sizes, len(rows))
    largest = np.argsort(-sizes_N, kind="stable")[:MOST_NAMED]
    largest = largest[sizes_N[largest] > 0]
    return (
        "The largest shares of |loss|: "
        f"{_named(rows, largest, [f'{size:.0%}' for size in sizes_N[largest] / sizes_N.sum()])}"
    )


def _rows_of(rows: RowColumns, places: Array) -> Array:
    """Return the row of each index into the flat response columns."""
    return np.searchsorted(np.cumsum(rows.response_lengths_N), places, side="right")


def _named(every: RowColumns, rows: Array, descriptions: Sequence[str]) -> str:
    """Name the samples of these rows, each with its description; samples after the first few are only counted."""
    samples, groups = every.columns["sample_indices"], every.columns["group_indices"]
    named = [
        f"sample {samples[row]} of group {groups[row]} ({description})"
        for row, description in zip(rows[:MOST_NAMED], descriptions[:MOST_NAMED], strict=True)
    ]
    more = [f"{len(rows) - MOST_NAMED} more samples"] if len(rows) > MOST_NAMED else []
    return ", ".join([*named, *more])


def _named_tokens(rows: RowColumns, places: Array, descriptions: Sequence[str]) -> str:
    """Name the samples that have these tokens, with the description of the first token of each."""
    spoilt, firsts, counts = np.unique(_rows_of(rows, places), return_index=True, return_counts=True)
    starts_N = np.cumsum(rows.response_lengths_N) - rows.response_lengths_N
    described = [
        _described(rows, row, count, int(places[first] - starts_N[row]), descriptions[int(first)])
        for row, first, count in zip(spoilt, firsts, counts, strict=True)
    ]
    return _named(rows, spoilt, described)


def _described(rows: RowColumns, row: int, count: int, first: int, description: str) -> str:
    return f"{count} of {rows.response_lengths_N[row]} response tokens, the first is {first}: {description}"
