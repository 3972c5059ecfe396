"""Packing: sample lengths -> optimizer steps -> data-parallel ranks -> micro-batches, in plain integers.

Path: `plan_steps` is called by every trainer on the lengths of the whole rollout, and `megatron.microbatch`
packs the rows that a plan names. Invariant: the plan is a function of its arguments alone (all ranks compute
the same one), every row lies in exactly one micro-batch, and all ranks of a step have equally many of them.

Rows are dealt to ranks first, by compute where --balance-data asks for it, and packed on each rank then. Packing the
whole step and dealing full micro-batches would save some of them where attention outweighs the rest (1 in 100), but
leaves ranks uneven by several per cent, and the step lasts as long as its busiest rank.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from slime.core.architecture import Architecture


def training_flops(architecture: Architecture) -> Callable[[int], float]:
    """FLOPs of forward and backward over one sample, as a function of its length T.

    6 x (parameters that multiply; of experts a token's own) x T, and 6 x layers x (heads x head size) x T^2 for causal
    attention's two products. Norms, softmax and recomputation are left out: the estimate serves to compare samples.
    """
    parameters = architecture.num_active_parameters()
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
    count_multiple: int = 1,
) -> list[StepPlan]:
    """Cut the rows, in order, into `num_steps` equal steps; deal and pack each.

    Args:
        total_lengths: tokens (prompt and response) of each row.
        max_tokens: token budget of a micro-batch (already x context parallelism). None: every micro-batch takes
            `micro_batch_size` rows.
        multiple: a micro-batch is padded up to a multiple of this; the padding counts against the budget.
        row_multiple: and so is every row of it.
        balance: deal rows to ranks by Karmarkar-Karp on `flops` (None: on length); else in contiguous runs.
        count_multiple: each rank gets a multiple of so many micro-batches.

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
            packed = _pack_ranks(dealt, padded, max(max_tokens // multiple * multiple, 1))
        count = max(len(part) for part in packed)
        count += -count % count_multiple
        plans.append(StepPlan([_split_to(part, count, padded) for part in packed]))
    return plans


_Indices: TypeAlias = "int | tuple[_Indices, _Indices]"
"""An index, or those of two parts that were joined: written out at the end only."""
_Part = tuple[float, int, _Indices]
"""A part of `partition`: its negative sum, its first index and all of them. Sorted, the heaviest comes first."""


def partition(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Indices of `costs` in `num_parts` parts of nearly equal sums, each part ascending.

    The largest differencing method (Karmarkar and Karp 1982) for several parts: of the two partial solutions
    with the widest spread, the heaviest part of one joins the lightest of the other. Empty parts are not listed, and
    the smaller solution is merged into the larger: most merges add one number, whatever `num_parts` is.
    """
    if num_parts == 1:
        return [list(range(len(costs)))]
    singles = sorted(((-cost, index) for index, cost in enumerate(costs)), reverse=True)
    joined: list[tuple[float, int, list[_Part]]] = []

    def pop() -> list[_Part]:
        """The partial solution with the widest spread, of equal ones the oldest."""
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
    """The heaviest part of one with the lightest of the other, and so on. Both lists are used up."""
    base, other = (first, second) if len(first) >= len(second) else (second, first)
    shared = max(0, len(first) + len(second) - num_parts)
    alone = len(other) - shared  # so many of the heaviest meet an empty part
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
    """Each rank's rows in bins, so that the rank with most bins has few.

    First-fit decreasing, and where that leaves a rank with more bins than the step might do with, fuller bins: they
    take longer to find.
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
                return packed  # the step has this many anyway
        packed = [fuller.get(rank, bins) for rank, bins in enumerate(packed)]
        most = max(len(bins) for bins in packed)
    return packed


_WORD = 2**14
"""Bits of an integer that are shifted in about the time that Python takes for anything."""
_WORK = 2**18
"""Shifts of so many bits that `_fullest_bins` may take for one step: a tenth of a second or two."""


def _at_least(rows: Sequence[int], lengths: Sequence[int], budget: int) -> int:
    """Bins that no packing does without: rows fill them, and no two of more than half the budget share one."""
    tokens = [min(lengths[row], budget) for row in rows]
    return max(-(-sum(tokens) // budget), sum(2 * length > budget for length in tokens))


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


def _first_fit_decreasing(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of rows whose lengths sum to at most `budget`; a longer row has a bin of its own.

    `room` is a tree over all bins there might be: each node has the most room of any bin below it, so that the first
    bin with room enough is found from the root.
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
    """Bins as `_first_fit_decreasing` makes them, each filled as far as any choice of rows can.

    The longest row left opens a bin; of what fits beside it, the subset with most tokens joins (the minimum bin slack
    heuristic of Gupta and Ho 1999, here by dynamic programming: bit t of `reached` is a subset of t tokens).
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
    """`bins` as exactly `count` bins: the one with most tokens is halved again and again, empty ones fill up."""
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
