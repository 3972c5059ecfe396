"""metrics.jsonl: a resumed run continues from the events that its checkpoint had seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.observability.metrics_log import MetricsLog, read_metrics


def steps(path: Path) -> list[int]:
    return [int(event["step"]) for event in read_metrics(path)]


def written(path: Path) -> MetricsLog:
    """Write two complete steps: an evaluation before them, and for each rollout its evaluation and its times."""
    log = MetricsLog(path)
    log.write(0, {"eval/x/reward": 0.1})
    for step in (1, 2):
        log.write(step, {"rollout/reward": step / 10})
        log.write(step, {"eval/x/reward": step / 10})
        log.write(step, {"time/step": 1.0})
    return log


def test_a_resumed_run_continues_from_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path).close()
    resumed = MetricsLog(path)
    resumed.rewind(1)
    resumed.write(1, {"time/step": 2.0})
    resumed.close()
    assert read_metrics(path) == [
        {"step": 0, "eval/x/reward": 0.1},
        {"step": 1, "rollout/reward": 0.1},
        {"step": 1, "time/step": 2.0},
    ]


def test_a_line_cut_by_a_kill_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    log = MetricsLog(path)
    assert log.repair() is None
    log.rewind(5)
    log.write(3, {"x": 1})
    log.close()
    assert steps(path) == [0, 1, 1, 1, 2, 2, 3]


def test_without_the_rewind_events_come_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        written(path).close()
    assert steps(path) == [0, 1, 1, 1, 2, 2, 2] * 2


GARBAGE = [
    b"\xff\xfe\x80\n",
    b"\0" * 500 + b"\n",
    b'{"step": 1, "x"\n',
    b"no json\n",
    b"[1, 2]\n",
    b'"step"\n',
    b'{"x": 1}\n',
    b'{"step": "1"}\n',
    b"[" * 100_000 + b"\n",
    b"\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=[repr(line[:12]) for line in GARBAGE])
def test_only_garbage_lines_are_moved_away(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([garbage, *lines[:3], garbage, *lines[3:]]))
    log = MetricsLog(path)
    warning = log.repair()
    assert warning is not None and warning.startswith(f"{path}:1, 5: not an event; 2 such lines were moved to ")
    assert path.read_bytes().splitlines(keepends=True) == lines
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == garbage * 2
    assert log.repair() is None, "control: the rest is complete"
    log.rewind(1)
    log.write(2, {"x": 1})
    log.close()
    assert steps(path) == [0, 1, 2]


def test_a_reader_names_the_line_that_is_garbage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path).close()
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(ValueError, match=f"{path}:8: not an event"):
        read_metrics(path)
