"""A run's directory takes one run at a time and keeps an earlier run's metrics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.core.errors import RunError
from slime.observability.metrics_log import read_metrics
from slime.observability.run_directory import RunDirectory

HOLD = "import sys, time, pathlib; from slime.observability.run_directory import RunDirectory as R; "
HOLD += "r = R(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_run_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"process {holder.pid} runs in this directory.*--save"):
        RunDirectory(tmp_path)
    holder.kill()
    holder.wait()
    RunDirectory(tmp_path).close()


def test_an_earlier_runs_metrics_are_kept_beside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for run in range(3):
        log = directory.new_metrics()
        log.write(1, {"run": run})
        log.close()
    directory.close()
    kept = [read_metrics(tmp_path / name)[0]["run"] for name in ("metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")]
    assert kept == [0, 1, 2]


def test_a_run_that_goes_on_keeps_its_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    log = directory.new_metrics()
    for step in (1, 2, 3):
        log.write(step, {"x": step})
    log.close()
    log = directory.continue_metrics(2)
    log.write(3, {"x": 30})
    log.close()
    directory.close()
    assert [event["x"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 30]
    assert not (tmp_path / "metrics-1.jsonl").exists()
