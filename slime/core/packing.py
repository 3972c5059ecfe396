"""Packing: sample lengths -> optimizer steps -> data-parallel ranks -> micro-batches, in plain integers.

Path: `plan_steps` is called by every trainer on the lengths of the whole rollout, and `megatron.microbatch`
packs the rows that a plan names. Invariant: the plan is a function of its arguments alone (all ranks compute
the same one), every row lies in exactly one micro-batch, and all ranks of a step have equally many of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime.core.architecture import Architecture


def training_flops(architecture: Architecture) -> Callable[[int], float]:
    """FLOPs of forward and backward over one sample, as a function of its length T.

    6 x (parameters that multiply) x T, and 6 x layers x (heads x head size) x T^2 for causal attention's two
    products. Norms, softmax and recomputation are left out: the estimate serves to compare samples.
    """
    parameters = architecture.num_parameters()
    if not architecture.tied_embeddings:
        parameters -= architecture.vocab_size * architecture.hidden_size  # the input table is looked up
    attention = architecture.num_layers * architecture.num_attention_heads * architecture.kv_channels

    def flops(length: int) -> float:
        return 6.0 * length * (parameters + attention * length)

    return flops


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step. `micro_batches[dp_rank]`: its micro-batches, each a list of rows of the TrainBatch.

    A micro-batch is empty where a rank has fewer samples than another has micro-batches.
    """

    micro_batches: list[list[list[int]]]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.micro_batches[0])

    @property
    def rows(self) -> list[int]:
        """All rows of the step, ascending."""
        return sorted(row for rank in self.micro_batches for rows in rank for row in rows)

    def fill(self, total_lengths: Sequence[int], max_tokens: int) -> float:
        """Share of the step's token budget (micro-batches x `max_tokens`) that holds samples' tokens, not padding."""
        tokens = sum(total_lengths[row] for row in self.rows)
        return tokens / (len(self.micro_batches) * self.num_micro_batches * max_tokens)

    def imbalance(self, total_lengths: Sequence[int], flops: Callable[[int], float] | None = None) -> float:
        """Cost of the busiest rank over the mean rank's: 1 is even. `flops` None: cost is length."""
        cost = flops or float
        costs = [sum(cost(total_lengths[row]) for rows in rank for row in rows) for rank in self.micro_batches]
        return max(costs) / (sum(costs) / len(costs))


def plan_steps(
    total_lengths: Sequence[int],
    *,
    num_steps: int,
    dp_size: int,
    max_tokens: int | None,
    micro_batch_size: int,
    multiple: int = 1,
    row_multiple: int = 1,
    balance: bool = False,
    flops: Callable[[int], float] | None = None,
) -> list[StepPlan]:
    """Cut the rows, in order, into `num_steps` equal steps; deal and pack each.

    Args:
        total_lengths: tokens (prompt and response) of each row.
        max_tokens: token budget of a micro-batch (already x context parallelism). None: every micro-batch takes
            `micro_batch_size` rows.
        multiple: a micro-batch is padded up to a multiple of this; the padding counts against the budget.
        row_multiple: and so is every row of it.
        balance: deal rows to ranks by Karmarkar-Karp on `flops` (None: on length); else in contiguous runs.

    Raises:
        ValueError: no rows, or rows left over by the cut into steps.
    """
    num_rows = len(total_lengths)
    if num_rows == 0 or num_rows % num_steps:
        raise ValueError(
            f"--num-steps-per-rollout {num_steps}: {num_rows} samples cannot be cut into {num_steps} equal steps; "
            "give a divisor of the number of samples (--rollout-batch-size x --n-samples-per-prompt)"
        )
    size = num_rows // num_steps
    cost = flops or float
    padded = [length + -length % row_multiple for length in total_lengths]
    plans: list[StepPlan] = []
    for start in range(0, num_rows, size):
        rows = range(start, start + size)
        if balance:
            parts = partition([cost(total_lengths[row]) for row in rows], dp_size)
            dealt = [[start + i for i in part] for part in parts]
        else:
            cuts = [start + size * rank // dp_size for rank in range(dp_size + 1)]
            dealt = [list(range(cuts[rank], cuts[rank + 1])) for rank in range(dp_size)]
        if max_tokens is None:
            packed = [_chunk(part, micro_batch_size) for part in dealt]
        else:
            budget = max_tokens // multiple * multiple
            packed = [_first_fit_decreasing(part, padded, budget) for part in dealt]
        count = max(len(part) for part in packed)
        plans.append(StepPlan([_split_to(part, count, padded) for part in packed]))
    return plans


_Parts = list[tuple[float, list[int]]]
"""A partial solution of `partition`: (sum, indices) of each part, heaviest first."""


def partition(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Indices of `costs` in `num_parts` parts of nearly equal sums, each part ascending.

    The largest differencing method (Karmarkar and Karp 1982) for several parts: of the two partial solutions
    with the widest spread, the heaviest part of one joins the lightest of the other.
    """
    heap: list[tuple[float, int, _Parts]] = []
    for index, cost in enumerate(costs):
        parts: _Parts = [(cost, [index])] + [(0.0, []) for _ in range(num_parts - 1)]
        heap.append((-cost if num_parts > 1 else 0.0, index, parts))
    heapq.heapify(heap)
    number = len(heap)  # breaks ties, so that equal spreads never compare their parts
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
        number += 1
    return [sorted(indices) for _, indices in heap[0][2]] if heap else [[] for _ in range(num_parts)]


def _chunk(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _first_fit_decreasing(rows: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of rows whose lengths sum to at most `budget`; a longer row has a bin of its own."""
    bins: list[list[int]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        for index, room in enumerate(free):
            if length <= room:
                bins[index].append(row)
                free[index] -= length
                break
        else:
            bins.append([row])
            free.append(budget - length)
    return bins


def _split_to(bins: list[list[int]], count: int, lengths: Sequence[int]) -> list[list[int]]:
    """`bins` as exactly `count` bins: the one with most tokens is halved again and again, empty ones fill up."""
    bins = list(bins)
    while len(bins) < count:
        splittable = [index for index, rows in enumerate(bins) if len(rows) > 1]
        if not splittable:
            bins.append([])
            continue
        largest = max(splittable, key=lambda index: sum(lengths[row] for row in bins[index]))
        rows = bins[largest]
        halves = partition([float(lengths[row]) for row in rows], 2)
        bins[largest], other = ([rows[i] for i in half] for half in halves)
        bins.append(other)
    return [sorted(rows) for rows in bins]
