"""Plans: every row once, within budget, equally many micro-batches, even, and the same every time."""

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def problems(
    plan: StepPlan, rows: range, lengths: list[int], budget: int, multiple: int, row_multiple: int
) -> list[str]:
    """What is wrong with a step's plan. One list of rules, so that the controls below use the same."""
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
def test_every_plan_is_sound_and_repeats(
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
    assert problems(two, range(3), lengths, 20, 1, 4) == ["over budget"], "that of rows too"
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


def test_a_longer_sample_stands_alone() -> None:
    (plan,) = plan_steps([50, 900, 40, 10], num_steps=1, dp_size=1, max_tokens=100, micro_batch_size=1)
    assert sorted(plan.micro_batches[0]) == [[0, 2, 3], [1]]


def test_packing_is_close_to_the_fewest_micro_batches() -> None:
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


def test_steps_are_cut_in_order_and_a_remainder_is_an_error() -> None:
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


def test_partition_is_near_the_best_split() -> None:
    """Against all splits of ten numbers in two; cutting them in the middle is the control that is worse."""
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
    """6 P T for the parameters that multiply (8.78 B: 9.4 B without the 0.62 B input table), plus attention."""
    flops = training_flops(GLM4_9B)
    parameters = GLM4_9B.num_parameters() - 151552 * 4096
    assert 8.7e9 < parameters < 8.9e9
    assert flops(1) == pytest.approx(6 * parameters, rel=1e-3)
    attention = flops(8192) - 8192 * 6 * parameters
    assert attention == pytest.approx(3 * 40 * 32 * (2 * 2 * 8192**2 * 128) / 2, rel=1e-6)  # 2 products, causal half
