"""Packing: sample lengths -> optimizer steps -> data-parallel ranks -> micro-batches, in plain integers.

- Used by: the rollout manager calls `plan_steps` on the lengths of the whole rollout (`config.rollout_plan`),
  `core.rank_batch` cuts the rollout into one part a rank, and `megatron.microbatch` packs the rows that a plan names.
- Invariant: the plan depends on its arguments alone; every row is in exactly one micro-batch; in a step all ranks have
  the same number of micro-batches.

A pipeline of P stages waits where neighbouring micro-batches differ in cost, and it waits P - 1 times for the first and
for the last. So with `lockstep` their order is from cheap to expensive and back to cheap. This is near to the best
order, and better than micro-batches of equal compute: a row of 128k tokens alone costs several times the mean, so the
others cannot equal it, and an equal cost of the others makes the first and the last expensive.

Rows are first dealt to ranks (by compute, with --balance-data), then packed on each rank. The alternative, to pack the
whole step and deal full micro-batches, would save about 1 micro-batch in 100 when attention dominates the cost, but it
leaves ranks uneven by several per cent, and a step takes as long as its busiest rank.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from slime.core.architecture import Architecture


def training_flops(architecture: Architecture) -> Callable[[int], float]:
    """Return a function from a sample's length T to the FLOPs of its forward and backward pass.

    6 x (parameters that multiply; of the experts, those that a token uses) x T, plus 6 x layers x (heads x head size) x
    T^2 for the two products of causal attention. Norms, softmax and recomputation are left out, because the estimate
    only serves to compare samples.
    """
    parameters = architecture.num_active_parameters()
    if not architecture.tied_embeddings:
        parameters -= architecture.vocab_size * architecture.hidden_size  # the embedding is a lookup
    attention = architecture.num_layers * architecture.num_attention_heads * architecture.kv_channels

    def flops(length: int) -> float:
        return 6.0 * length * (parameters + attention * length)

    return flops


def row_multiple(context_ranks: int) -> int:
    """Return the multiple to which each row is padded: two chunks of equal length for each context-parallel rank."""
    return 2 * context_ranks if context_ranks > 1 else 1


def pack_multiple(context_ranks: int, multiple: int) -> int:
    """Return the multiple to which a pack is padded so that each rank's tokens are a multiple of `multiple`."""
    return math.lcm(row_multiple(context_ranks), context_ranks * multiple)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `micro_batches[dp_rank]` lists a rank's micro-batches, each a list of rows of the TrainBatch.

    A micro-batch is empty when a rank has fewer samples than another rank has micro-batches.

    Example: four rows of 3, 5, 2 and 2 tokens, two ranks, at most 5 tokens in a micro-batch. Rank 0 gets rows 0 and 1,
    whose 8 tokens need two micro-batches; rank 1 gets rows 2 and 3, which would fit into one, but both ranks need two.

    >>> lengths = [3, 5, 2, 2]
    >>> [plan] = plan_steps(lengths, num_steps=1, dp_size=2, max_tokens=5, micro_batch_size=1)
    >>> plan.micro_batches
    [[[1], [0]], [[2], [3]]]
    >>> plan.num_micro_batches, plan.rows
    (2, [0, 1, 2, 3])
    >>> plan.fill(lengths, 5)  # 12 tokens in four micro-batches of 5
    0.6
    >>> round(plan.imbalance(lengths), 3)  # 8 tokens on rank 0, 4 on rank 1
    1.333
    """

    micro_batches: list[list[list[int]]]

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches of each rank."""
        return len(self.micro_batches[0])

    @property
    def rows(self) -> list[int]:
        """All rows of the step, in ascending order."""
        return sorted(row for rank in self.micro_batches for rows in rank for row in rows)

    def fill(self, total_lengths: Sequence[int], max_tokens: int) -> float:
        """Return the share of the step's token budget (micro-batches x `max_tokens`) that holds tokens, not padding."""
        tokens = sum(total_lengths[row] for row in self.rows)
        return tokens / (len(self.micro_batches) * self.num_micro_batches * max_tokens)

    def imbalance(self, total_lengths: Sequence[int], flops: Callable[[int], float] | None = None) -> float:
        """Return the cost of the busiest rank over the mean cost; 1 is even. Without `flops`, cost is length."""
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
    count_multiple: int = 1,
    lockstep: bool = False,
) -> list[StepPlan]:
    """Cut the rows, in order, into `num_steps` equal steps; deal each step's rows to ranks and pack them.

    Args:
        total_lengths: tokens (prompt and response) of each row.
        max_tokens: token budget of a micro-batch, already multiplied by the context parallel size. None: every
            micro-batch takes `micro_batch_size` rows.
        multiple: a micro-batch is padded to a multiple of this; the padding counts against the budget.
        row_multiple: each row inside a micro-batch is padded to a multiple of this.
        balance: deal rows to ranks by Karmarkar-Karp on `flops` (None: on length); otherwise in contiguous runs.
        count_multiple: each rank gets a multiple of this number of micro-batches.
        lockstep: order each rank's micro-batches by cost, rising and falling. Pipeline stages wait for each other in
            each micro-batch, and so do ranks that share experts, whose nth micro-batches then cost about the same.

    Raises:
        ValueError: there are no rows, or they cannot be cut into equal steps.
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
            packed = _pack_ranks(dealt, padded, max(max_tokens // multiple * multiple, 1))
        count = max(len(part) for part in packed)
        count += -count % count_multiple
        split = [_split_to(part, count, padded) for part in packed]
        if lockstep:
            split = [_rising_and_falling(bins, total_lengths, cost) for bins in split]
        plans.append(StepPlan(split))
    return plans


def _rising_and_falling(bins: list[list[int]], lengths: Sequence[int], cost: Callable[[int], float]) -> list[list[int]]:
    """Order bins so that costs rise to the most expensive and fall again: 1, 3, 5, 4, 2."""
    ordered = sorted(bins, key=lambda rows: sum(cost(lengths[row]) for row in rows))
    return ordered[::2] + ordered[1::2][::-1]


_Indices: TypeAlias = "int | tuple[_Indices, _Indices]"
"""An index, or the indices of two parts that were joined. The pairs are flattened only at the end."""
_Part = tuple[float, int, _Indices]
"""One part in `partition`: its negative sum, first index and all indices. In sorted order the heaviest is first."""


def partition(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Divide the indices of `costs` into `num_parts` parts with nearly equal sums; each part is ascending.

    This is the largest differencing method (Karmarkar and Karp 1982) for several parts. Every number begins as a
    partial solution of its own. The two solutions with the widest spread are merged, again and again: the heaviest part
    of one joins the lightest part of the other. For two parts and the costs 8, 7, 6, 5, 4: first {8} against {7}
    (spread 1), then {6} against {5} (spread 1), then 4 against one of the two, and so on.

    Empty parts are not stored, and the smaller solution is merged into the larger, so most merges add one number,
    whatever `num_parts` is.
    """
    if num_parts == 1:
        return [list(range(len(costs)))]
    singles = sorted(((-cost, index) for index, cost in enumerate(costs)), reverse=True)
    joined: list[tuple[float, int, list[_Part]]] = []

    def pop() -> list[_Part]:
        """Take the partial solution with the widest spread; among equals, the oldest."""
        if singles and (not joined or singles[-1][0] <= joined[0][0]):
            negative, index = singles.pop()
            return [(negative, index, index)]
        return heapq.heappop(joined)[2]

    for number in range(len(costs) - 1):
        merged = _joined(pop(), pop(), num_parts)
        lightest = merged[-1][0] if len(merged) == num_parts else 0.0
        heapq.heappush(joined, (merged[0][0] - lightest, number, merged))
    parts = [_listed(part[2]) for part in pop()] if costs else []
    return parts + [[] for _ in range(num_parts - len(parts))]


def _joined(first: list[_Part], second: list[_Part], num_parts: int) -> list[_Part]:
    """Join the heaviest part of one with the lightest part of the other, and so on. Both lists are consumed."""
    base, other = (first, second) if len(first) >= len(second) else (second, first)
    shared = max(0, len(first) + len(second) - num_parts)
    alone = len(other) - shared  # this many of the heaviest parts join an empty part
    joined = other[:alone]
    for part in other[alone:]:
        x, y = (base.pop(), part) if base is first else (part, base.pop())
        joined.append((x[0] + y[0], x[1], (x[2], y[2])))
    if len(joined) > 8:
        base += joined
        base.sort()
    else:
        for part in joined:
            insort(base, part)
    return base


def _listed(indices: _Indices) -> list[int]:
    """Flatten joined indices into a sorted list."""
    found: list[int] = []
    left = [indices]
    while left:
        last = left.pop()
        if isinstance(last, int):
            found.append(last)
        else:
            left += last
    return sorted(found)


def _chunk(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _pack_ranks(dealt: Sequence[list[int]], lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
    """Pack each rank's rows into bins, so that the rank with the most bins has few.

    Use first-fit decreasing. When that leaves a rank with more bins than the step might need, look for fuller bins,
    which takes longer.
    """
    packed = [_first_fit_decreasing(rows, lengths, budget) for rows in dealt]
    fewest = max(_at_least(rows, lengths, budget) for rows in dealt)
    most = max(len(bins) for bins in packed)
    while most > fewest:
        ranks = [rank for rank, bins in enumerate(packed) if len(bins) == most]
        if sum(len(dealt[rank]) for rank in ranks) * most * (1 + budget // _WORD) > _WORK:
            break
        fuller: dict[int, list[list[int]]] = {}
        for rank in ranks:
            fuller[rank] = _fullest_bins(dealt[rank], lengths, budget)
            if len(fuller[rank]) >= most:
                return packed  # no gain: the step needs this many bins anyway
        packed = [fuller.get(rank, bins) for rank, bins in enumerate(packed)]
        most = max(len(bins) for bins in packed)
    return packed


_WORD = 2**14
"""Bits of an integer that Python shifts in about the time of any single operation."""
_WORK = 2**18
"""The number of such shifts that `_fullest_bins` may use for one step: one or two tenths of a second."""


def _at_least(rows: Sequence[int], lengths: Sequence[int], budget: int) -> int:
    """Return a lower bound on the number of bins: two rows of more than half the budget never share one."""
    tokens = [min(lengths[row], budget) for row in rows]
    return max(-(-sum(tokens) // budget), sum(2 * length > budget for length in tokens))


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


def _first_fit_decreasing(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return bins of rows whose lengths sum to at most `budget`; a row longer than that has a bin of its own.

    `room` is a binary tree over all possible bins. Each node holds the most room of any bin below it, so the first bin
    with enough room is found by walking down from the root.
    """
    leaves = 1 << max(len(rows) - 1, 0).bit_length()
    room = [budget] * (2 * leaves)
    bins: list[list[int]] = []
    for row in _longest_first(rows, lengths):
        length = min(lengths[row], budget)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(row)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def _fullest_bins(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return bins like `_first_fit_decreasing`, but fill each one as far as any choice of rows can.

    The longest remaining row opens a bin. Of the rows that still fit, the subset with the most tokens joins it (the
    minimum bin slack heuristic of Gupta and Ho 1999). The subset is found by dynamic programming on a bit set: bit t of
    `reached` is set if some subset has exactly t tokens. Example: rows of 2 and 3 tokens give reached = 0b101101, that
    is 0, 2, 3 and 5.
    """
    left: list[int] = _longest_first(rows, lengths)
    bins: list[list[int]] = []
    while left:
        room = max(budget - lengths[left[0]], 0)
        inside = (1 << (room + 1)) - 1
        reached, before = 1, [0]
        for row in left[1:]:
            before.append(reached)
            if lengths[row] <= room:
                reached |= (reached << lengths[row]) & inside
            if reached >> room:
                break
        tokens = reached.bit_length() - 1
        chosen = {0}
        for place in range(len(before) - 1, 0, -1):
            if not before[place] >> tokens & 1:
                chosen.add(place)
                tokens -= lengths[left[place]]
        bins.append([left[place] for place in sorted(chosen)])
        left = [row for place, row in enumerate(left) if place not in chosen]
    return bins


def _split_to(bins: list[list[int]], count: int, lengths: Sequence[int]) -> list[list[int]]:
    """Turn `bins` into exactly `count` bins: halve the bin with the most tokens repeatedly, then add empty ones."""
    bins = list(bins)
    splittable: list[tuple[int, int]] = []

    def offer(index: int) -> None:
        if len(bins[index]) > 1:
            heapq.heappush(splittable, (-sum(lengths[row] for row in bins[index]), index))

    if len(bins) < count:
        for index in range(len(bins)):
            offer(index)
    while len(bins) < count:
        if not splittable:
            bins.append([])
            continue
        _, largest = heapq.heappop(splittable)
        rows = bins[largest]
        halves = partition([float(lengths[row]) for row in rows], 2)
        bins[largest], other = ([rows[i] for i in half] for half in halves)
        bins.append(other)
        offer(largest)
        offer(len(bins) - 1)
    return [sorted(rows) for rows in bins]
