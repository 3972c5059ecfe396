"""Plans: every row once, within budget, equal numbers of micro-batches, balanced, and reproducible."""

import doctest
import heapq
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.packing import DISTRIBUTIONS, draw_lengths, l2_bound, pack_set
from slime.core import packing
from slime.core.architecture import Architecture
from slime.core.packing import StepPlan, partition, plan_steps, training_flops

GLM4_9B = Architecture(
    family="glm4",
    num_layers=40,
    hidden_size=4096,
    ffn_hidden_size=13696,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151552,
    max_position_embeddings=32768,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(packing)
    assert result.attempted == 6 and result.failed == 0


def problems(
    plan: StepPlan, rows: range, lengths: list[int], budget: int, multiple: int, row_multiple: int
) -> list[str]:
    """Return the rules that a step's plan breaks. The controls below use the same list."""
    found: list[str] = []
    if plan.rows != list(rows):
        found.append("rows")
    if len({len(rank) for rank in plan.micro_batches}) != 1:
        found.append("unequal numbers of micro-batches")
    for rank in plan.micro_batches:
        for micro_batch in rank:
            tokens = sum(-(-lengths[row] // row_multiple) * row_multiple for row in micro_batch)
            if len(micro_batch) > 1 and -(-tokens // multiple) * multiple > budget:
                found.append("over budget")
    return found


def test_costs_in_lockstep_rise_and_fall() -> None:
    """The micro-batches are the same ones, and none is cheaper than both of its neighbours."""
    lengths = draw_lengths("log-normal", 200, np.random.default_rng(0)).tolist()
    flops = training_flops(GLM4_9B)

    def plan(lockstep: bool) -> list[list[list[int]]]:
        [step] = plan_steps(
            lengths,
            num_steps=1,
            dp_size=2,
            max_tokens=9000,
            micro_batch_size=1,
            balance=True,
            flops=flops,
            lockstep=lockstep,
        )
        return step.micro_batches

    def valleys(rank: list[list[int]]) -> int:
        costs = [sum(flops(lengths[row]) for row in rows) for rows in rank]
        return sum(left > cost < right for left, cost, right in zip(costs, costs[1:], costs[2:], strict=False))

    for plain, ordered in zip(plan(False), plan(True), strict=True):
        assert sorted(plain) == sorted(ordered) and len(plain) > 8
        assert valleys(ordered) == 0 < valleys(plain), "the order of packing is a control"


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    num_steps=st.integers(1, 3),
    dp_size=st.integers(1, 4),
    budget=st.integers(1, 600),
    multiple=st.sampled_from([1, 2, 4, 16]),
    row_multiple=st.sampled_from([1, 4, 8]),
    balance=st.booleans(),
)
def test_every_plan_is_sound_and_reproducible(
    lengths: list[int], num_steps: int, dp_size: int, budget: int, multiple: int, row_multiple: int, balance: bool
) -> None:
    lengths = lengths * num_steps

    def plan() -> list[StepPlan]:
        return plan_steps(
            lengths,
            num_steps=num_steps,
            dp_size=dp_size,
            max_tokens=budget,
            micro_batch_size=1,
            multiple=multiple,
            row_multiple=row_multiple,
            balance=balance,
        )

    plans = plan()
    assert len(plans) == num_steps
    size = len(lengths) // num_steps
    for index, step in enumerate(plans):
        assert len(step.micro_batches) == dp_size
        assert problems(step, range(index * size, (index + 1) * size), lengths, budget, multiple, row_multiple) == []
    assert plans == plan()


def test_the_rules_notice_a_bad_plan() -> None:
    lengths = [10, 10, 10]
    two = StepPlan([[[0, 1]], [[2]]])
    assert problems(StepPlan([[[0, 1, 2]], [[]]]), range(3), lengths, 20, 1, 1) == ["over budget"]
    wrong = StepPlan([[[0, 1], [2]], [[]]])
    assert problems(wrong, range(3), lengths, 20, 1, 1) == ["unequal numbers of micro-batches"]
    assert problems(StepPlan([[[0, 1]], [[1]]]), range(3), lengths, 20, 1, 1) == ["rows"]
    assert problems(two, range(3), lengths, 20, 16, 1) == ["over budget"], "padding counts"
    assert problems(two, range(3), lengths, 20, 1, 4) == ["over budget"], "and so does the padding of rows"
    assert problems(two, range(3), lengths, 20, 1, 1) == []


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 40), dp_size=st.integers(1, 4), micro_batch_size=st.integers(1, 5), balance=st.booleans()
)
def test_fixed_micro_batches_hold_at_most_their_size(
    num_rows: int, dp_size: int, micro_batch_size: int, balance: bool
) -> None:
    lengths = [7 + row % 5 for row in range(num_rows)]
    (plan,) = plan_steps(
        lengths, num_steps=1, dp_size=dp_size, max_tokens=None, micro_batch_size=micro_batch_size, balance=balance
    )
    assert plan.rows == list(range(num_rows))
    assert len({len(rank) for rank in plan.micro_batches}) == 1
    assert all(len(rows) <= micro_batch_size for rank in plan.micro_batches for rows in rank)


def test_a_too_long_sample_is_alone() -> None:
    (plan,) = plan_steps([50, 900, 40, 10], num_steps=1, dp_size=1, max_tokens=100, micro_batch_size=1)
    assert sorted(plan.micro_batches[0]) == [[0, 2, 3], [1]]


def fewest_bins(lengths: list[int], budget: int) -> int:
    """Return the optimum by trying everything: each item, longest first, in every bin whose room is different."""
    items = sorted(lengths, reverse=True)
    best = len(items)

    def place(index: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(items):
            best = len(rooms)
            return
        for room in sorted({room for room in rooms if room >= items[index]}):
            others = list(rooms)
            others.remove(room)
            place(index + 1, (*others, room - items[index]))
        place(index + 1, (*rooms, budget - items[index]))

    place(0, ())
    return best


def l2_written_out(lengths: list[int], budget: int) -> int:
    """Martello and Toth's formula, set by set, for every threshold up to half a bin."""
    found = 0
    for threshold in range(budget // 2 + 1):
        first = [w for w in lengths if w > budget - threshold]
        second = [w for w in lengths if budget - threshold >= w > budget / 2]
        third = [w for w in lengths if budget / 2 >= w >= threshold]
        left_over = sum(third) - (len(second) * budget - sum(second))
        found = max(found, len(first) + len(second) + max(0, -(-left_over // budget)))
    return found


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), budget=st.integers(30, 41))
def test_no_packing_beats_martello_and_toths_bound(lengths: list[int], budget: int) -> None:
    bound = l2_bound(lengths, budget)
    assert bound == l2_written_out(lengths, budget)
    (plan,) = plan_steps(lengths, num_steps=1, dp_size=1, max_tokens=budget, micro_batch_size=1)
    best = fewest_bins(lengths, budget)
    assert -(-sum(lengths) // budget) <= bound <= best <= plan.num_micro_batches <= best + 1
    assert 2 * best <= 3 * bound  # Martello and Toth's proof


def test_the_bound_is_stronger_than_the_sum() -> None:
    assert l2_bound([6, 6, 6], 10) == 3  # 18 tokens would fit into two
    assert l2_bound([8, 7, 3, 3], 10) == 3 == fewest_bins([8, 7, 3, 3], 10)
    assert l2_bound([25, 5], 10) == 2  # an item longer than a bin fills one


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_micro_batches_are_close_to_the_bound(kind: str) -> None:
    """These are the benchmark's sets, but fewer, and each plan is checked. Next fit is the control that is worse."""
    rng = np.random.default_rng(7)
    sets = [pack_set(kind, rng) for _ in range(300)]
    assert np.mean([one.micro_batches / one.bound for one in sets]) <= 1.005
    assert max(one.micro_batches - one.bound for one in sets) <= 2
    assert np.mean([one.next_fit / one.bound for one in sets]) > 1.1
    assert np.mean([one.fill for one in sets]) > 0.95


def test_fuller_bins_save_the_step_a_micro_batch() -> None:
    """First-fit decreasing needs 3 bins where 2 are enough; the rank with the most bins decides for all."""
    rows = [4, 4, 3, 3, 3, 3]
    assert packing._first_fit_decreasing(range(6), rows, 10) == [[0, 1], [2, 3, 4], [5]]
    (plan,) = plan_steps(rows, num_steps=1, dp_size=1, max_tokens=10, micro_batch_size=1)
    assert plan.micro_batches == [[[0, 2, 3], [1, 4, 5]]]
    (plan,) = plan_steps(rows + [9] * 6, num_steps=1, dp_size=2, max_tokens=10, micro_batch_size=1)
    assert plan.num_micro_batches == 6
    assert all(plan.micro_batches[0]), "a rank with fewer bins splits them instead of computing padding"
    many = [2, 2, 3, 3, 3, 5] * 20
    assert len(packing._first_fit_decreasing(range(120), many, 9)) == 44
    (plan,) = plan_steps(many, num_steps=1, dp_size=1, max_tokens=9, micro_batch_size=1)
    assert plan.num_micro_batches == 40, "a step of this size is worth the search"


def test_bins_are_halved_until_there_are_enough() -> None:
    """Rank 0 needs eight micro-batches; rank 1's single bin of eight rows is split into eight."""
    (plan,) = plan_steps([10] * 8 + [1] * 8, num_steps=1, dp_size=2, max_tokens=10, micro_batch_size=1)
    assert sorted(plan.micro_batches[1]) == [[row] for row in range(8, 16)]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=60), budget=st.integers(1, 100))
def test_the_tree_finds_the_first_bin_with_room(lengths: list[int], budget: int) -> None:
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        having_room = [rows for rows in bins if sum(lengths[r] for r in rows) + lengths[row] <= budget]
        if having_room:
            having_room[0].append(row)
        else:
            bins.append([row])
    assert packing._first_fit_decreasing(range(len(lengths)), lengths, budget) == bins


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), budget=st.integers(1, 100))
def test_the_fullest_bin_cannot_be_fuller(lengths: list[int], budget: int) -> None:
    bins = packing._fullest_bins(range(len(lengths)), lengths, budget)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    first, *rest = bins
    longest = max(lengths)
    others = list(lengths)
    others.remove(longest)
    sums = {longest}
    for length in others:
        sums |= {total + length for total in sums if total + length <= budget}
    assert sum(lengths[row] for row in first) == max(sums)
    assert all(sum(lengths[row] for row in rows) <= budget or len(rows) == 1 for rows in rest)


def test_a_balanced_plan_ignores_the_row_order() -> None:
    """Reordered rows form the same groups (if no two sums are equal); dealt in contiguous runs, they do not."""

    def groups(rows: list[int], number: list[int], dp_size: int, balance: bool) -> list[list[list[int]]]:
        (plan,) = plan_steps(
            rows,
            num_steps=1,
            dp_size=dp_size,
            max_tokens=1_500_000,
            micro_batch_size=1,
            balance=balance,
            flops=lambda length: length**1.37,
        )
        return sorted(sorted(sorted(number[row] for row in rows) for rows in rank) for rank in plan.micro_batches)

    for seed in range(30):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 1_000_000) for _ in range(rng.randint(10, 60))]
        order = list(range(len(lengths)))
        dp_size = rng.randint(2, 4)
        expected = {balance: groups(lengths, order, dp_size, balance) for balance in (False, True)}
        rng.shuffle(order)
        permuted = [lengths[row] for row in order]
        assert groups(permuted, order, dp_size, True) == expected[True]
        assert groups(permuted, order, dp_size, False) != expected[False]


@pytest.mark.parametrize("balance", [False, True])
def test_a_thousand_ranks_can_be_planned(balance: bool) -> None:
    """This is a tenth of the benchmark's rows. Contiguous runs are the control: uneven, and more micro-batches."""
    lengths = draw_lengths("log-normal", 20_000, np.random.default_rng(0)).tolist()
    (plan,) = plan_steps(
        lengths, num_steps=1, dp_size=1024, max_tokens=8192, micro_batch_size=1, balance=balance, flops=None
    )
    assert problems(plan, range(20_000), lengths, 8192, 1, 1) == []
    fewest = -(-l2_bound(lengths, 8192) // 1024)
    if balance:
        assert plan.imbalance(lengths) < 1.01
        assert plan.num_micro_batches == fewest
    else:
        assert plan.imbalance(lengths) > 1.5
        assert plan.num_micro_batches > 1.3 * fewest


def test_packing_is_close_to_the_optimum() -> None:
    """First-fit decreasing needs at most 11/9 of the optimum (+ 1); next-fit is the control that is worse."""
    rng = random.Random(0)
    lengths = [rng.randint(100, 4000) for _ in range(256)]
    budget = 4608
    (plan,) = plan_steps(lengths, num_steps=1, dp_size=1, max_tokens=budget, micro_batch_size=1)
    next_fit, room = 0, 0
    for length in lengths:
        if length > room:
            next_fit, room = next_fit + 1, budget
        room -= length
    assert plan.num_micro_batches <= -(-sum(lengths) // budget) * 11 / 9 + 1
    assert plan.num_micro_batches < next_fit * 0.9
    assert plan.fill(lengths, budget) == pytest.approx(sum(lengths) / (plan.num_micro_batches * budget))
    assert plan.fill(lengths, budget) > 0.9


def test_steps_are_cut_in_order_without_remainder() -> None:
    plans = plan_steps([5] * 12, num_steps=3, dp_size=2, max_tokens=None, micro_batch_size=2)
    assert [plan.rows for plan in plans] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert plans[0].micro_batches == [[[0, 1]], [[2, 3]]]
    for lengths in ([5] * 10, []):
        with pytest.raises(ValueError, match=r"--num-steps-per-rollout 3: \d+ samples"):
            plan_steps(lengths, num_steps=3, dp_size=2, max_tokens=None, micro_batch_size=2)


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.floats(0, 1e6), max_size=30), num_parts=st.integers(1, 5))
def test_partition_takes_every_index_once(costs: list[float], num_parts: int) -> None:
    parts = partition(costs, num_parts)
    assert len(parts) == num_parts
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    assert parts == partition(costs, num_parts)


def differencing_written_out(costs: list[float], num_parts: int) -> list[list[int]]:
    """Karmarkar and Karp's method with every empty part listed, as it is usually written."""
    heap = [(-cost, index, [(cost, [index])] + [(0.0, [])] * (num_parts - 1)) for index, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        number = 2 * len(costs) - len(heap)
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return [sorted(indices) for _, indices in heap[0][2]]


@settings(max_examples=150, deadline=None)
@given(costs=st.lists(st.integers(1, 12), min_size=1, max_size=60), num_parts=st.integers(2, 20))
def test_partition_is_the_differencing_method(costs: list[int], num_parts: int) -> None:
    """Many of these costs and sums are equal, so ties are tested as well."""
    floats = [float(cost) for cost in costs]
    assert partition(floats, num_parts) == differencing_written_out(floats, num_parts)


def test_partition_is_near_the_best_split() -> None:
    """Compare with all splits of ten numbers in two; cutting them in the middle is the control that is worse."""
    rng = random.Random(1)
    cut_in_the_middle: list[float] = []
    for _ in range(20):
        costs = [float(rng.randint(1, 1000)) for _ in range(10)]
        best = min(
            abs(sum(cost if side else -cost for cost, side in zip(costs, sides, strict=True)))
            for sides in product([False, True], repeat=10)
        )
        first, second = partition(costs, 2)
        found = abs(sum(costs[i] for i in first) - sum(costs[i] for i in second))
        assert found <= best + 0.02 * sum(costs)
        cut_in_the_middle.append(abs(sum(costs[:5]) - sum(costs[5:])) / sum(costs))
    assert max(cut_in_the_middle) > 0.2
    assert partition([8.0, 7.0, 6.0, 5.0, 4.0], 2) == [[1, 3, 4], [0, 2]]  # Karmarkar and Karp's own example: 16, 14


def test_balance_evens_out_compute() -> None:
    rng = random.Random(2)
    lengths = sorted(int(rng.lognormvariate(6.5, 1)) + 1 for _ in range(256))
    flops = training_flops(GLM4_9B)

    def imbalance(balance: bool) -> float:
        (plan,) = plan_steps(
            lengths, num_steps=1, dp_size=4, max_tokens=4608, micro_batch_size=1, balance=balance, flops=flops
        )
        return plan.imbalance(lengths, flops)

    assert imbalance(True) < 1.01
    assert imbalance(False) > 1.5


def test_training_flops_of_glm4_9b() -> None:
    """6 P T for the parameters that multiply (8.78 B: 9.4 B without the 0.62 B of the embedding), plus attention."""
    flops = training_flops(GLM4_9B)
    parameters = GLM4_9B.num_parameters() - 151552 * 4096
    assert 8.7e9 < parameters < 8.9e9
    assert flops(1) == pytest.approx(6 * parameters, rel=1e-3)
    attention = flops(8192) - 8192 * 6 * parameters
    assert attention == pytest.approx(3 * 40 * 32 * (2 * 2 * 8192**2 * 128) / 2, rel=1e-6)  # 2 products, causal half
