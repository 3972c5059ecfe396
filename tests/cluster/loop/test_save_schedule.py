"""When a checkpoint is due: by number, by the clock within its share of the time, and always after the last rollout."""

from __future__ import annotations

import itertools

import pytest

from slime.cluster.loop.save_schedule import SaveSchedule
from slime.config.args import Args


class Clock:
    """Seconds that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def saved(args: Args, *, rollouts: int, seconds: float, cost: float) -> list[int]:
    """Return the rollouts after which a run saves, if each takes `seconds` and each save `cost`."""
    clock = Clock()
    schedule = SaveSchedule(args, rollouts - 1, clock=clock)
    found: list[int] = []
    for rollout_id in range(rollouts):
        clock.now += seconds
        if schedule.due(rollout_id):
            schedule.begun()  # it is written while the run goes on
            schedule.saved(cost)
            found.append(rollout_id)
    return found


def test_by_the_clock() -> None:
    args = Args(save="x", save_interval_minutes=10)
    assert saved(args, rollouts=10, seconds=150, cost=1) == [3, 7, 9]
    assert saved(args, rollouts=3, seconds=1, cost=1) == [2], "a short run saves once, at its end"
    assert saved(args, rollouts=3, seconds=3600, cost=1) == [0, 1, 2]


@pytest.mark.parametrize("cost", [0.1, 5.0, 60.0, 600.0])
def test_saves_take_a_small_share(cost: float) -> None:
    args = Args(save="x", save_interval_minutes=1)
    number = len(saved(args, rollouts=10_000, seconds=30, cost=cost))
    whole = 10_000 * 30
    assert (number - 2) * cost / whole <= 0.03, "the first and the last do not know or heed the share"
    by_number = len(saved(Args(save="x", save_interval=2), rollouts=10_000, seconds=30, cost=cost))
    assert by_number == 5_000 and (cost < 5 or by_number * cost / whole > 0.03), "the control saves too often"


def test_by_number() -> None:
    assert saved(Args(save="x", save_interval=3), rollouts=8, seconds=1e6, cost=1) == [2, 5, 7]
    assert saved(Args(save="x"), rollouts=8, seconds=1e6, cost=1) == [7]
    both = Args(save="x", save_interval=3, save_interval_minutes=10)
    assert saved(both, rollouts=8, seconds=300, cost=1) == [1, 2, 4, 5, 7]


def test_never() -> None:
    for args in (Args(save="x", save_interval=0, save_interval_minutes=1), Args(save=None, save_interval=1)):
        assert saved(args, rollouts=3, seconds=1e6, cost=1) == []


def test_a_resumed_run_counts_on() -> None:
    clock = Clock()
    schedule = SaveSchedule(Args(save="x", save_interval=4), 9, clock=clock)
    assert list(itertools.compress(range(5, 10), map(schedule.due, range(5, 10)))) == [7, 9]
