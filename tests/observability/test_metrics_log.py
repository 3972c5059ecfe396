"""metrics.jsonl: what a resumed run writes continues what the checkpoint had seen."""

from __future__ import annotations

from pathlib import Path

from slime.observability.metrics_log import MetricsLog, read_metrics


def test_a_resumed_run_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, {"rollout/reward": 0.5})
    cursor = log.cursor
    log.write(2, {"rollout/reward": 0.75})
    log.close()

    resumed = MetricsLog(path)
    resumed.rewind(cursor)
    assert resumed.cursor == cursor
    resumed.write(2, {"rollout/reward": 0.25})
    resumed.close()
    assert read_metrics(path) == [{"step": 1, "rollout/reward": 0.5}, {"step": 2, "rollout/reward": 0.25}]


def test_without_the_rewind_the_event_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log = MetricsLog(path)
        log.write(2, {"x": 1})
        log.close()
    assert [event["step"] for event in read_metrics(path)] == [2, 2]


def test_a_moved_file_is_not_padded(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(10_000)
    log.write(1, {"x": 1})
    log.close()
    assert read_metrics(log.path) == [{"step": 1, "x": 1}]
