"""MLflow, Trackio and SwanLab have the numbers of metrics.jsonl, each step once; read back by their own readers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from slime.cluster.loop.start_trackers import start_trackers
from slime.config.args import Args
from slime.config.experiment_trackers import TRACKERS
from slime.core.errors import RunError
from slime.observability.mlflow_tracker import metric_name
from slime.observability.samples_file import SamplesFile
from tests.observability.test_trackers import broken_and_resumed, of_metrics, step, tracked

Points = dict[str, list[tuple[int, float]]]
SAMPLES = [{"group": 0, "index": index, "prompt": "1+1=", "response": f"answer {index}"} for index in (0, 1)]


def in_mlflow(directory: Path) -> tuple[Points, list[str]]:
    """Return all values of the one run, and its samples as texts."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == "slime"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["lr"] == "0.5"
    points = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return points, [path.read_text() for path in sorted(directory.glob("mlflow-artifacts/**/step-*.json"))]


def in_trackio(directory: Path) -> tuple[Points, list[str]]:
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("slime")
    points: Points = {}
    texts: list[str] = []
    for row in SQLiteStorage.get_logs("slime", run):
        for name, value in row.items():
            if isinstance(value, dict):
                texts.append(json.dumps(value))
            elif name not in ("step", "timestamp"):
                points.setdefault(name, []).append((row["step"], value))
    return points, texts


def in_swanlab(directory: Path) -> tuple[Points, list[str]]:
    """Return what the last start has written."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    file = max(directory.glob("swanlab/*/*.swanlab"), key=lambda path: path.stat().st_mtime_ns)
    reader = DataStoreReader()
    reader.open(file)
    points: Points = {}
    for data in reader:
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "scalar":
            scalar = record.scalar
            points.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
    return points, [path.read_text() for path in sorted(file.parent.glob("media/text/**/*.txt"))]


READ: dict[str, Callable[[Path], tuple[Points, list[str]]]] = {
    "mlflow": in_mlflow,
    "trackio": in_trackio,
    "swanlab": in_swanlab,
}


@pytest.fixture(params=READ)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a tracker that is installed, all of whose files go under `tmp_path`."""
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install 'slime[{request.param}]'")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    if request.param == "trackio":
        import trackio.sqlite_storage
        import trackio.utils

        for module in (trackio, trackio.utils, trackio.sqlite_storage):  # a constant of each, read from TRACKIO_DIR
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    return request.param


def made(directory: Path, name: str) -> Args:
    return Args(trackers=(name,), log_dir=str(directory), lr=0.5, rollout_stop=("a",))


def expected(directory: Path, name: str) -> Points:
    points = of_metrics(directory)
    return {metric_name(key): values for key, values in points.items()} if name == "mlflow" else points


def test_a_tracker_holds_what_metrics_jsonl_holds(tmp_path: Path, name: str) -> None:
    directory, lines = tmp_path / "run", list[str]()
    log = tracked(directory, made(directory, name), first=0, new=True, lines=lines)
    log.write(0, {"eval/x/reward": 0.25, "eval/x/pass@4": 0.5})
    for number in range(1, 21):
        SamplesFile(directory / "samples.jsonl").write(number, "train", SAMPLES if number == 3 else [])
        step(log, number, number / 7)
    log.close()
    assert lines == []
    points, texts = READ[name](directory)
    assert {key: sorted(values) for key, values in points.items()} == expected(directory, name)
    assert len(points["train/loss"]) == 20
    assert sum("answer 1" in text for text in texts) == 1, "the samples of step 3, once"


def test_a_resumed_tracker_has_no_step_twice(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "run"
    assert broken_and_resumed(directory, made(directory, name)) == []
    points, _ = READ[name](directory)
    for key, values in points.items():
        steps = [at for at, _ in values]
        assert sorted(set(steps)) == sorted(steps), key
    losses = dict(points["train/loss"])
    assert sorted(losses) == [1, 2, 3, 4, 5]
    assert losses[5] == 50 and dict(points["time/step"])[5] == 50
    if name == "swanlab":  # offline, every start writes the whole run again
        assert {key: sorted(values) for key, values in points.items()} == expected(directory, name)
    else:
        assert losses[3] == 3 and math.isnan(losses[4]), "what was sent stays"


def test_a_tracker_that_cannot_start_names_its_flag(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown://server")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "no-url")
    with pytest.raises(RunError, match=f"--trackers {name}: the run cannot be started there"):
        start_trackers(made(tmp_path / "file", name), "run", 0)


def test_every_tracker_is_read_back() -> None:
    assert set(TRACKERS) == {*READ, "tensorboard", "wandb"}
