"""The clock of a step: its phases sum to the wall time, and impossible claims are refused."""

from __future__ import annotations

import time

import pytest

from slime.observability.phases import PHASES, StepClock, format_memory, format_shares, memory_record


def test_phases_and_idle_sum_to_the_step() -> None:
    clock = StepClock()
    start = time.perf_counter()
    with clock.phase("weight_sync"):
        time.sleep(0.02)
    with clock.inner() as seconds:
        time.sleep(0.03)
        seconds["generation"], seconds["reward"] = 0.015, 0.005
    time.sleep(0.01)
    record = clock.close()
    wall = time.perf_counter() - start
    assert sum(record[f"time/{name}"] for name in (*PHASES, "idle")) == pytest.approx(record["time/step"], abs=1e-9)
    assert record["time/step"] <= wall + 1e-3
    assert record["time/weight_sync"] >= 0.02
    assert record["time/idle"] >= 0.01 + 0.01, "unclaimed time inside `inner` is idle too"


def test_a_claim_beyond_the_wall_time_is_refused() -> None:
    clock = StepClock()
    with pytest.raises(AssertionError, match="claim"), clock.inner() as seconds:
        seconds["training"] = 5.0


def test_shares_are_parts_of_the_step() -> None:
    record = {f"time/{name}": 0.0 for name in PHASES} | {"time/idle": 1.0, "time/step": 4.0, "time/training": 3.0}
    assert format_shares(record) == "4.00 s = training 75% + idle 25%"


def test_memory_is_the_maximum_over_trainers() -> None:
    peaks = [{"peak": 1.0, "device": 7.0}, {"peak": 3.0, "device": 6.0}]
    record = memory_record("training", peaks) | memory_record("weight_sync", [{"peak": 2.5}])
    assert record == {
        "memory/training_peak_gb": 3.0,
        "memory/training_device_gb": 7.0,
        "memory/weight_sync_peak_gb": 2.5,
    }
    assert format_memory(record) == "GB at most: training 7, weight sync 2.5"
    assert memory_record("training", []) == {} == memory_record("training", [{}])
    assert format_memory({}) == ""
