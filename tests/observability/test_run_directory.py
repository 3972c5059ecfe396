"""A run's directory takes one run at a time and keeps an earlier run's metrics."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slime.core.errors import RunError
from slime.observability.metrics_log import read_metrics
from slime.observability.run_directory import RunDirectory, make_directory
from slime.observability.samples_file import SamplesFile, read_samples

HOLD = """
import pathlib, sys, time
from slime.observability.run_directory import RunDirectory
log, save, hf = map(pathlib.Path, sys.argv[1:])
held = RunDirectory(log, [save], [hf])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    """One shared place is enough, whatever else differs; a kill releases all locks."""
    log, save, hf = tmp_path / "log", tmp_path / "save", tmp_path / "hf" / "{rollout_id}" / "x"
    command = [sys.executable, "-c", HOLD, str(log), str(save), str(hf)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    other = tmp_path / "other"
    link = tmp_path / "link"
    link.symlink_to(save)
    for path, directories, outputs in (
        (log, [], []),
        (other, [save], []),
        (other, [link], []),
        (save, [], []),
        (other, [], [hf]),
        (other, [], [hf.parent]),
    ):
        message = rf"in use by process {holder.pid} on \S+ since 20\d\d-.*--save, --log-dir"
        with pytest.raises(RunError, match=message):
            RunDirectory(path, directories, outputs)
    free = RunDirectory(other, [tmp_path], [hf.parents[1] / "rollout-{rollout_id}", tmp_path / "hf"])
    free.close()
    holder.kill()
    holder.wait()
    RunDirectory(log, [save], [hf]).close()


def test_a_failed_start_releases_its_locks(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "b")
    with pytest.raises(RunError, match=f"{tmp_path}/b: in use by"):
        RunDirectory(tmp_path / "a", [tmp_path / "b"])
    RunDirectory(tmp_path / "a").close()
    first.close()


def test_an_unwritable_place_gives_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/nothing")):
        with pytest.raises(RunError, match=f"{path}: the run cannot write there"):
            RunDirectory(tmp_path / "log", [path])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(RunError, match="full: the run cannot write there"):
            RunDirectory(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    RunDirectory(tmp_path / "full").close()


def test_an_earlier_runs_metrics_are_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for run in range(3):
        log = directory.new_metrics()
        log.write(1, {"run": run})
        log.close()
        if run != 1:
            SamplesFile(tmp_path / "samples.jsonl").write(1, "train", [{"run": run}])
    directory.close()
    kept = [read_metrics(tmp_path / name)[0]["run"] for name in ("metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")]
    assert kept == [0, 1, 2]
    of_samples = {path.name: next(read_samples(path))["run"] for path in tmp_path.glob("samples*.jsonl")}
    assert of_samples == {"samples-1.jsonl": 0, "samples.jsonl": 2}, "each has the number of its metrics"


def test_a_resumed_run_keeps_its_file(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    log = directory.new_metrics()
    for step in (1, 2, 3):
        log.write(step, {"x": step})
    log.close()
    log, warning = directory.continue_metrics(2)
    assert warning == []
    log.write(3, {"x": 30})
    log.close()
    directory.close()
    assert [event["x"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 30]
    assert not (tmp_path / "metrics-1.jsonl").exists()


def test_unusable_run_files_give_one_message(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    (tmp_path / "args.yaml").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "logs").write_text("")
    for use, name in (
        (lambda: directory.write_args("x"), "args.yaml"),
        (lambda: directory.continue_metrics(1), "metrics.jsonl"),
        (lambda: directory.run_id(new=True), "logs/run_id"),
    ):
        with pytest.raises(RunError, match=f"{tmp_path}/{name}: cannot be used"):
            use()
    (tmp_path / "logs").unlink()
    name = directory.run_id(new=True)
    assert directory.run_id(new=False) == name
    (tmp_path / "logs/run_id").write_bytes(b"\xff\x00garbage")
    assert directory.run_id(new=False) not in (name, "")
    directory.close()


MAKE = """
import sys, time
from pathlib import Path
from slime.observability.run_directory import make_directory
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    print(make_directory(Path("outputs"), "mine"), flush=True)
"""


def test_runs_of_the_same_second_get_directories(tmp_path: Path) -> None:
    """Processes that start together, with the same name: no directory is given out twice."""
    command = [sys.executable, "-c", MAKE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    started = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    made = [line for process in started for line in process.communicate("go\n")[0].split()]
    names = ["mine", *(f"mine-{number}" for number in range(2, 41))]
    assert sorted(made) == sorted(str(tmp_path / "outputs" / name) for name in names)


def test_a_run_without_a_name_has_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260102-030405")
    first, second = (make_directory(tmp_path / "new" / "outputs", None) for _ in range(2))
    assert (first.name, second.name) == ("20260102-030405", "20260102-030405-2")


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        with pytest.raises(RunError, match=f"{folder}: the run cannot make its directory there .*with --save"):
            make_directory(folder, "mine")
