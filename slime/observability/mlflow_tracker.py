"""MLflow as a tracker: at the server that MLflow's own environment variables name, or in a file of the run.

- Used by: its row in `slime.config.experiment_trackers`; the interface is `slime.observability.trackers.Tracker`.
- Invariant: each step is sent once, together with a tag by which a resumed run knows that it was sent.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from slime.observability.samples_file import COLUMNS, Row, table
from slime.observability.trackers import RowTracker, TrackedRun

RUN_ID, LAST_STEP = "slime.run_id", "slime.last_step"
"""Tags of an MLflow run: which run it is, and the last step that was sent."""
_PER_REQUEST = 1000
"""Metrics that MLflow takes at once."""
_PARAMS_PER_REQUEST = 100
_LONGEST_PARAM = 6000


class MLflow(RowTracker):
    """One MLflow run. MLflow cannot take metrics back: if a step is done twice, its first row stays.

    MLFLOW_TRACKING_URI names a server or database; without it the run has a database mlflow.db of its own.
    """

    name = "MLflow"

    def __init__(self, client: Any, mlflow_run: Any, first: int) -> None:
        """`client` and `mlflow_run` are MLflow's own objects, and `first` the step from which the run resumes."""
        self._client = client
        self._id: str = mlflow_run.info.run_id
        super().__init__(first, int(mlflow_run.data.tags.get(LAST_STEP, -1)) + 1)

    @classmethod
    def start(cls, run: TrackedRun) -> MLflow:
        """Open the run in MLFLOW_EXPERIMENT_NAME, or in the experiment `slime`."""
        # A server that does not answer must not hold up training: MLflow's own limits add up to many minutes.
        for name, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # the console belongs to the run
        mlflow: Any = importlib.import_module("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            client = mlflow.MlflowClient(tracking_uri=uri or f"sqlite:///{run.directory.absolute()}/mlflow.db")
            artifacts = None if uri else (run.directory.absolute() / "mlflow-artifacts").as_uri()
            return cls(client, _open(client, mlflow.entities, run, artifacts), run.first)
        except Exception as error:  # (MLflow raises its own, SQLAlchemy's and those of requests)
            raise run.refused(
                error, "check MLFLOW_TRACKING_URI, or unset it for a file in the run's directory"
            ) from error

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        entities: Any = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        metrics = [entities.Metric(metric_name(name), float(value), now, step) for name, value in row.items()]
        for begin in range(0, len(metrics), _PER_REQUEST):
            part = metrics[begin : begin + _PER_REQUEST]
            is_last = begin + _PER_REQUEST >= len(metrics)
            sent = [entities.RunTag(LAST_STEP, str(step))] if is_last else []
            self._client.log_batch(self._id, metrics=part, tags=sent)

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:
        text = json.dumps({"columns": COLUMNS, "data": table(rows)}, ensure_ascii=False)
        self._client.log_text(self._id, text, f"samples/{metric_name(split)}/step-{step:06d}.json")

    def close(self, *, ok: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ok else "FAILED")


def _open(client: Any, entities: Any, run: TrackedRun, artifacts: str | None) -> Any:
    """Return MLflow's run with this name: the one that is there, or a new one with the arguments as its parameters."""
    experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "slime"
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        experiment_id = client.create_experiment(experiment_name, artifact_location=artifacts)
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_ID}` = '{run.run_id}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]
    made = client.create_run(experiment_id, run_name=run.run_id, tags={RUN_ID: run.run_id})
    params = [entities.Param(name, str(value)[:_LONGEST_PARAM]) for name, value in run.config.items()]
    for begin in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(made.info.run_id, params=params[begin : begin + _PARAMS_PER_REQUEST])
    return made


def metric_name(name: str) -> str:
    """Return the name as MLflow accepts it: `eval/x/pass@4` becomes `eval/x/pass_at_4`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
