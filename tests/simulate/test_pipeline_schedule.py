"""The time of a pipeline's schedule, against the known bubble and against a search for the longest chain of passes."""

from __future__ import annotations

import doctest
import random
from functools import cache

import pytest

from slime.simulate import pipeline
from slime.simulate.pipeline import pipeline_time


def test_the_example_holds() -> None:
    assert doctest.testmod(pipeline).failed == 0


@pytest.mark.parametrize(("count", "stages"), [(1, 4), (3, 4), (4, 2), (16, 8)])
def test_equal_micro_batches_have_the_known_bubble(count: int, stages: int) -> None:
    assert pipeline_time([3.0] * count, stages) == pytest.approx(3.0 * (count + stages - 1))
    assert pipeline_time([3.0] * count, stages, parts=2) == pytest.approx(3.0 * (count + (stages - 1) / 2))
    assert pipeline_time([3.0] * count, 1) == 3.0 * count


def longest_chain(costs: list[float], stages: int) -> float:
    """Return the end of the last pass by recursion over what each pass waits for."""
    last = len(costs) - 1

    def before(stage: int, forward: bool, number: int) -> tuple[bool, int] | None:
        """Return the pass that this stage runs before this one."""
        ahead = stages - 1 - stage  # forward passes that this stage is ahead of its backward passes
        if forward and number <= ahead:
            return (True, number - 1) if number else None
        if forward:
            return False, number - ahead - 1
        if number + ahead <= last:
            return True, number + ahead
        return (False, number - 1) if number else (True, last)

    @cache
    def end(stage: int, forward: bool, number: int) -> float:
        start = 0.0
        own = before(stage, forward, number)
        if own is not None:
            start = end(stage, *own)
        if forward and stage > 0:
            start = max(start, end(stage - 1, True, number))
        if not forward and stage < stages - 1:
            start = max(start, end(stage + 1, False, number))
        return start + costs[number] * (1 / 3 if forward else 2 / 3)

    return max(end(stage, False, last) for stage in range(stages))


@pytest.mark.parametrize("seed", range(8))
def test_uneven_micro_batches_take_their_longest_chain(seed: int) -> None:
    draw = random.Random(seed)
    costs = [draw.choice([1.0, 2.0, 9.0]) for _ in range(draw.randint(1, 9))]
    stages = draw.randint(2, 5)
    assert pipeline_time(costs, stages) == pytest.approx(longest_chain(costs, stages))


def test_expensive_ends_take_longer() -> None:
    middle, ends = [1.0, 2.0, 9.0, 8.0, 2.0, 1.0], [9.0, 2.0, 1.0, 1.0, 2.0, 8.0]
    assert pipeline_time(middle, 4) < 0.8 * pipeline_time(ends, 4)
