"""Each metric of a step is written once, and a step in which engine and trainer disagree gets a warning."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from slime.cluster.loop.journal import Journal
from slime.observability.console.run_console import Output, RunConsole
from slime.observability.metrics_log import MetricsLog, read_metrics

GAP = "train/logprob_gap_mean"


def keep_journal(path: Path, gap: float, alarm: float | None) -> str:
    """Keep the journal of two steps, with a sync after the first, and return what the console shows."""
    shown = io.StringIO()
    console = RunConsole(Output(file=shown, soft_wrap=True))
    metrics = MetricsLog(path)
    journal = Journal(metrics, console, take_peaks=lambda: [{"peak": 1.0}, {"peak": 2.0}], gap_alarm=alarm)
    for rollout in range(2):
        journal.begin(rollout)
        journal.add("training", {GAP: gap, f"only/{rollout}": 1.0})
        journal.trained(rollout)
        if rollout == 0:
            journal.synced({"sync/bytes": 7.0})
        journal.end(rollout, journal.close())
    metrics.close()
    console.close()
    return shown.getvalue()


@pytest.mark.parametrize(("gap", "alarm", "warns"), [(0.2, 0.1, True), (0.05, 0.1, False), (0.2, None, False)])
def test_a_gap_above_the_alarm_is_reported(tmp_path: Path, gap: float, alarm: float | None, warns: bool) -> None:
    shown = keep_journal(tmp_path / "metrics.jsonl", gap, alarm)
    assert shown.count("engine and trainer disagree") == (2 if warns else 0)


def test_metrics_of_a_step_are_written_once(tmp_path: Path) -> None:
    keep_journal(tmp_path / "metrics.jsonl", 0.0, None)
    events = read_metrics(tmp_path / "metrics.jsonl")
    steps = {name: [event["step"] for event in events if name in event] for event in events for name in event}
    assert steps[GAP] == steps["memory/training_peak_gb"] == steps["time/step"] == [1, 2]
    assert (steps["only/0"], steps["only/1"]) == ([1], [2]), "nothing of the step before"
    assert steps["sync/bytes"] == steps["memory/weight_sync_peak_gb"] == [1, 2], "until the next sync"
    assert {event["memory/training_peak_gb"] for event in events if GAP in event} == {2.0}, "the largest of all ranks"
