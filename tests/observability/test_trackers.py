"""Trackers have the events of metrics.jsonl, each step once, also after a resume; read back from their own files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.cluster.loop.start_trackers import start_trackers
from slime.config.args import Args
from slime.config.experiment_trackers import TRACKERS, TrackerFacts
from slime.megatron.checkpoint.files import find_checkpoint
from slime.observability.metrics_log import MetricsLog, read_metrics
from slime.observability.run_directory import RunDirectory
from slime.observability.samples_file import SamplesFile
from slime.observability.trackers import TrackedRun, Tracker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # its settings are read again
    yield
    wandb.teardown()


def tracked(directory: Path, args: Args, *, first: int, new: bool, lines: list[str]) -> MetricsLog:
    """Start a run, or resume it from the checkpoint of step `first`."""
    run = RunDirectory(directory)
    log = run.new_metrics() if new else run.continue_metrics(first)[0]
    log.track(start_trackers(args, run.run_id(new=new), first), lines.append)
    run.close()
    return log


def step(log: MetricsLog, number: int, value: float) -> None:
    """Write the three events of a rollout."""
    log.write(number, {"train/loss": value, "note": "not a number"})
    log.write(number, {"eval/x/reward": value})
    log.write(number, {"time/step": value})


def broken_and_resumed(directory: Path, args: Args) -> list[str]:
    """Write an evaluation before the first step and three steps, then a kill; resume from the checkpoint of step 2."""
    lines: list[str] = []
    log = tracked(directory, args, first=0, new=True, lines=lines)
    log.write(0, {"eval/x/reward": 0.0})
    for number in (1, 2, 3):
        step(log, number, number)
    log.write(4, {"train/loss": float("nan")})
    log.close()
    log = tracked(directory, args, first=2, new=False, lines=lines)
    log.write(2, {"time/step": 20.0})
    log.write(2, {"eval/x/reward": 20.0})
    for number in (3, 4, 5):
        step(log, number, number * 10)
    log.close()
    assert find_checkpoint(directory) is None, "what a tracker leaves there is the run's own: it may start there again"
    return lines


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_metrics(path / "metrics.jsonl"):
        for name, value in event.items():
            if name != "step" and not isinstance(value, str):
                found.setdefault(name, []).append((int(event["step"]), value))
    return found


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    args = Args(use_tensorboard=True, tensorboard_dir=str(tmp_path / "tb"), log_dir=str(tmp_path / "run"))
    assert broken_and_resumed(tmp_path / "run", args) == []
    [directory] = (tmp_path / "tb").iterdir()
    found = scalars(directory)
    assert found == of_metrics(tmp_path / "run")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert found["eval/x/reward"][:3] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_without_the_purge_steps_come_twice(tmp_path: Path) -> None:
    import torch.utils.tensorboard

    for first in (1, 2):
        writer = torch.utils.tensorboard.SummaryWriter(str(tmp_path))  # pyright: ignore[reportPrivateImportUsage]
        for number in range(first, 4):
            writer.add_scalar("x", number, number)
        writer.close()
    assert len(scalars(tmp_path)["x"]) == 5


def test_a_late_tracker_gets_all_earlier_events(tmp_path: Path) -> None:
    args = Args(use_tensorboard=True, tensorboard_dir=str(tmp_path / "tb"), log_dir=str(tmp_path / "run"))
    lines: list[str] = []
    log = tracked(tmp_path / "run", Args(), first=0, new=True, lines=lines)
    step(log, 1, 1.0)
    step(log, 2, 2.0)
    log.close()
    tracked(tmp_path / "run", args, first=2, new=False, lines=lines).close()
    [late] = (tmp_path / "tb").iterdir()
    assert scalars(late)["train/loss"] == [(1, 1.0), (2, 2.0)]
    log = tracked(tmp_path / "run", args, first=0, new=True, lines=lines)
    step(log, 1, 5.0)
    log.close()
    [other] = set((tmp_path / "tb").iterdir()) - {late}
    assert scalars(other)["train/loss"] == [(1, 5.0)]


def wandb_rows(directory: Path) -> list[list[dict[str, Any]]]:
    """Return the rows of each offline run, with its config first."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    wandb.teardown()  # its process has written everything
    runs: list[list[dict[str, Any]]] = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        store = DataStore()
        store.open_for_scan(str(file))
        rows: list[dict[str, Any]] = []
        while (data := store.scan_data()) is not None:
            record = Record.FromString(data)
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                rows.append({"id": record.run.run_id, "project": record.run.project, **config})
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
                rows.append({name: json.loads(item.value_json) for name, item in items.items()})
            if record.HasField("exit"):
                rows.append({"exit": record.exit.exit_code})
        runs.append(rows)
    return runs


def test_wandb_has_one_row_per_step(tmp_path: Path, offline: None) -> None:
    directory = tmp_path / "run"
    args = Args(use_wandb=True, wandb_project="p", log_dir=str(directory), rollout_stop=("a",), lr=0.5)
    assert broken_and_resumed(directory, args) == []
    first, second = wandb_rows(directory)
    assert first[0]["id"] == second[0]["id"] == (directory / "logs/run_id").read_text()
    assert (first[0]["project"], first[0]["lr"], first[0]["rollout_stop"]) == ("p", 0.5, ["a"])
    assert [row["_step"] for row in first[1:-1]] == [0, 1, 2, 3, 4]
    assert math.isnan(first[-2]["train/loss"])
    assert [row["_step"] for row in second[1:-1]] == [0, 1, 2, 3, 4, 5], "offline, the whole run is written again"
    rows = {row["_step"]: row for row in second[1:-1]}
    names = ("train/loss", "eval/x/reward", "time/step")
    assert [rows[2][name] for name in names] == [2, 20, 20]
    assert [rows[5][name] for name in names] == [50, 50, 50]
    assert first[-1] == second[-1] == {"exit": 0}
    for name, points in of_metrics(directory).items():
        assert [(number, row[name]) for number, row in rows.items() if name in row] == points


def test_an_error_ends_the_wandb_run_as_failed(tmp_path: Path, offline: None) -> None:
    args = Args(use_wandb=True, wandb_project="p", log_dir=str(tmp_path / "run"))
    log = tracked(tmp_path / "run", args, first=0, new=True, lines=[])
    with pytest.raises(RuntimeError, match="the run fails"):
        try:
            raise RuntimeError("the run fails")
        finally:
            log.close()
    [rows] = wandb_rows(tmp_path / "run")
    assert rows[-1] == {"exit": 1}


SAMPLES = [{"group": 0, "index": at, "prompt": "1+1=", "response": f"``` {at}", "reward": at} for at in (0, 1)]


def test_samples_become_a_table_and_a_text(tmp_path: Path, offline: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, lines = tmp_path / "run", list[str]()
    args = Args(use_wandb=True, use_tensorboard=True, tensorboard_dir=str(tmp_path / "tb"), log_dir=str(directory))
    samples = SamplesFile(directory / "samples.jsonl")
    log = tracked(directory, args, first=0, new=True, lines=lines)
    for number in (1, 2):
        samples.write(number + 1, "train", SAMPLES)  # of the rollout in advance
        samples.write(number, f"eval/{number}", SAMPLES[:number])
        step(log, number, 1.0)
    log.close()
    assert lines == []
    [rows] = wandb_rows(directory)
    assert [row["_step"] for row in rows[1:-1]][:2] == [1, 2]
    tables = [json.loads(path.read_text()) for path in sorted(directory.glob("wandb/offline*/files/**/*.table.json"))]
    assert [len(table["data"]) for table in tables] == [1, 2, 2], "two evaluations and step 2; step 3 is not reached"
    assert all(table["data"][0][3] == "``` 0" for table in tables)
    [events] = (tmp_path / "tb").iterdir()
    found = EventAccumulator(str(events))
    found.Reload()
    assert set(found.Tags()["tensors"]) == {f"samples/{split}/text_summary" for split in ("train", "eval/1", "eval/2")}
    [text] = found.Tensors("samples/train/text_summary")
    assert text.step == 2
    assert b"````text\n``` 1\n````" in text.tensor_proto.string_val[0], "a fence in a response ends nothing"


class Failing(Tracker):
    """A tracker that works until the network fails."""

    name = "Failing"

    def __init__(self, works: int) -> None:
        self.left = works

    @classmethod
    def start(cls, run: TrackedRun) -> Failing:
        return cls(works=int(run.config["num_rollout"]))

    def log(self, step: int, metrics: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route")

    def log_samples(self, step: int, split: str, rows: Any) -> None:
        raise ConnectionError("no tables")

    def finish(self, *, ok: bool) -> None:
        raise ConnectionError("no route")


def test_a_failing_table_costs_no_metrics(tmp_path: Path) -> None:
    lines, tracker = list[str](), Failing(works=100)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.track([tracker], lines.append)
    for number in (1, 2):
        SamplesFile(tmp_path / "samples.jsonl").write(number, "train", SAMPLES)
        step(log, number, 1.0)
    assert lines == ["WARNING Failing takes no samples (no tables); samples.jsonl has them"]
    assert tracker.left == 100 - 6


def test_errors_name_the_flag_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrackedRun] = []
    start = Failing.start

    def remember(run: TrackedRun) -> Tracker:
        seen.append(run)
        return start(run)

    monkeypatch.setattr(Failing, "start", remember)
    facts = TrackerFacts(tracker=f"{__name__}.Failing", switch="use_wandb")
    monkeypatch.setitem(TRACKERS, "wandb", facts)  # pyright: ignore[reportArgumentType]
    for args in (Args(use_wandb=True, trackers=("wandb",)), Args(use_wandb=True)):
        start_trackers(replace(args, num_rollout=1, log_dir=str(tmp_path)), "run", 0)
    assert [run.flag for run in seen] == ["--trackers wandb", "--use-wandb"]
    assert str(seen[1].refused(ValueError("no"), "try")) == "--use-wandb: the run cannot be started there (no); try"


def test_a_failing_tracker_gives_one_warning(tmp_path: Path) -> None:
    lines: list[str] = []
    other = Failing(works=100)
    trackers: list[Tracker] = [Failing(works=2), other]
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.track(trackers, lines.append)
    for number in (1, 2):
        step(log, number, 1.0)
    assert len(lines) == 1
    assert "Failing failed (no route) and gets no more data" in lines[0]
    assert other.left == 100 - 6
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    assert len(lines) == 2


FILE = """
from slime.observability.trackers import TrackedRun, Tracker

class Ledger(Tracker):
    name = "Ledger"

    def __init__(self, file):
        self.file = file

    @classmethod
    def start(cls, run):
        return cls((run.directory / f"{run.run_id}.ledger").open("a"))

    def log(self, step, metrics):
        print(step, *metrics.values(), file=self.file, flush=True)

    def finish(self, *, ok):
        print("ok" if ok else "failed", file=self.file, flush=True)
"""
ROW = 'TRACKERS["ledger"] = TrackerFacts(tracker="ledger.Ledger")\n'
USE = """
import sys
from pathlib import Path
from slime.cluster.loop.start_trackers import start_trackers
from slime.config.parse import load_args
from slime.observability.metrics_log import MetricsLog

args, _ = load_args(["--dry-run", "--trackers", "ledger", "--log-dir", sys.argv[1]], training=False)
log = MetricsLog(Path(sys.argv[1]) / "metrics.jsonl")
log.write(0, {"eval/reward": 0.5})
log.track(start_trackers(args, "run", 0), print)
log.write(1, {"train/loss": 2.0})
log.close()
"""


def test_one_class_and_one_row_add_a_tracker(tmp_path: Path) -> None:
    (tmp_path / "ledger.py").write_text(FILE)
    head = "from slime.config.experiment_trackers import TRACKERS, TrackerFacts\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    for row in ("", ROW):
        command = [sys.executable, "-c", head + row + USE, str(tmp_path)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        if row:
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "run.ledger").read_text() == "0 0.5\n1 2.0\nok\n"
        else:
            assert done.returncode != 0
            assert "--trackers ledger: must be one of tensorboard, wandb, mlflow, trackio, swanlab" in done.stderr
