"""Waves of prompts: how groups are counted into them, and when empty ones end the run."""

from __future__ import annotations

from collections import Counter

import pytest

from slime.config.args import Args
from slime.rollout.waves import Wave, Waves


def made(max_empty: int = 2) -> Waves:
    return Waves(Args(rollout_batch_size=2, over_sampling_batch_size=3, max_empty_waves=max_empty), 5)


def wave_of(waves: Waves) -> Wave:
    first, *others = [waves.join() for _ in range(waves.size)]
    assert all(other is first for other in others)
    return first


def drop(waves: Waves, wave: Wave, count: int = 3, reason: str = "zero_std", error: Exception | None = None) -> None:
    for _ in range(count):
        waves.dropped(wave, reason, Counter({reason: 6}), error)


def test_groups_join_waves_in_order() -> None:
    waves = made()
    assert (waves.size, waves.begun) == (3, False)
    first, second = wave_of(waves), waves.join()
    assert waves.begun is True
    assert (first, second) == (Wave(drawn=3), Wave(drawn=1))
    assert Waves(Args(rollout_batch_size=2), 5).size == 2


def test_consecutive_empty_waves_end_the_run() -> None:
    waves = made()
    drop(waves, wave_of(waves))
    some = wave_of(waves)
    waves.kept(some)
    drop(waves, some, 2)
    assert some == Wave(drawn=3, settled=3, kept=1)
    drop(waves, wave_of(waves))
    last = wave_of(waves)
    drop(waves, last, 2)
    with pytest.raises(RuntimeError, match=r"^rollout 5: nothing was kept in 2 waves of 3 prompts .*: 6 by zero_std;"):
        drop(waves, last, 1)


def test_a_wave_of_failures_ends_the_run() -> None:
    waves = made(max_empty=3)
    mixed = wave_of(waves)
    drop(waves, mixed, 2, "generation_failed")
    drop(waves, mixed, 1)
    assert mixed.failed == 2
    error = OSError("http://engine did not answer")
    with pytest.raises(RuntimeError, match=r"generation failed for all of 3 groups, .*did not answer") as raised:
        drop(waves, wave_of(waves), 3, "generation_failed", error)
    assert raised.value.__cause__ is error
