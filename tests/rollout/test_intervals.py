from __future__ import annotations

import random

from slime.rollout.intervals import PhaseIntervals


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_generation_and_reward_times_are_disjoint() -> None:
    clock = _Clock()
    intervals = PhaseIntervals(clock)
    clock.now = 1  # idle
    with intervals.judging():
        clock.now = 3  # reward: 2
        with intervals.generating():
            clock.now = 6  # both: generation 3
            with intervals.generating():
                clock.now = 7  # generation 1
                assert intervals.requests_in_flight == 2
        clock.now = 7.5  # reward: 0.5
    clock.now = 9  # idle
    assert (intervals.generation_seconds, intervals.reward_seconds) == (4, 2.5)


def test_the_two_never_exceed_the_wall_time() -> None:
    clock = _Clock()
    intervals = PhaseIntervals(clock)
    draw = random.Random(0)
    running = []
    for _ in range(500):
        clock.now += draw.random()
        if running and draw.random() < 0.5:
            running.pop(draw.randrange(len(running))).__exit__(None, None, None)
        else:
            entry = draw.choice([intervals.generating, intervals.judging])()
            entry.__enter__()
            running.append(entry)
    total = intervals.generation_seconds + intervals.reward_seconds
    assert 0 < total <= clock.now
