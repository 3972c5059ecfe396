"""Drawn and recorded lengths."""

from __future__ import annotations

import statistics

import pytest

from slime.simulate.lengths import LogNormal, Recorded, RecordedGroup


def test_log_normal_has_its_mean_and_percentile() -> None:
    lengths = LogNormal(1000.0, 4000.0, 100_000, prompt_length=5)
    drawn = sorted(lengths.response(prompt, 31 * prompt) for prompt in range(40_000))
    assert statistics.fmean(drawn) == pytest.approx(1000, rel=0.02)
    assert drawn[int(0.99 * len(drawn))] == pytest.approx(4000, rel=0.05)


def test_equal_lengths() -> None:
    lengths = LogNormal(50.0, 50.0, 64, prompt_length=5)
    assert {lengths.response(prompt, seed) for prompt in range(9) for seed in range(9)} == {50}


@pytest.mark.parametrize(("mean", "p99"), [(100.0, 99.0), (100.0, 2000.0)])
def test_impossible_percentiles_are_refused(mean: float, p99: float) -> None:
    with pytest.raises(ValueError, match="99th percentile of 1 to 15 times"):
        _ = LogNormal(mean, p99, 1000, prompt_length=5).sigma


def test_lengths_depend_on_prompt_and_seed_alone() -> None:
    lengths = LogNormal(100.0, 400.0, 1000, prompt_length=5)
    assert lengths.response(3, 4) == lengths.response(3, 4)
    assert len({lengths.response(3, seed) for seed in range(20)}) > 10
    assert len({lengths.response(prompt, 4) for prompt in range(20)}) > 10


def test_recorded_groups_are_used_equally_often() -> None:
    groups = [RecordedGroup(number, (10 * number, 10 * number + 1)) for number in range(1, 6)]
    lengths = Recorded(groups, longest=100)
    assert sorted(lengths.prompt(prompt) for prompt in range(10)) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for prompt in range(10):
        assert lengths.response(prompt, 5) == lengths.response(prompt, 5)
        number = lengths.prompt(prompt)
        assert {lengths.response(prompt, seed) for seed in (5, 9)} == {10 * number, 10 * number + 1}
