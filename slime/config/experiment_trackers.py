"""The experiment trackers: one row for each, with what has to be there before a run starts.

- Used by: the choices of --trackers and the rules; `slime.cluster.loop.start_trackers` starts the class in a row.
- Invariant: no other place lists the trackers.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


def _wandb_fault() -> tuple[str, str] | None:
    """Refuse W&B if it finds no account in its environment variables, settings files or netrc, but needs one."""
    wandb: Any = importlib.import_module("wandb")
    if wandb.setup().settings.mode != "online" or wandb.api.api_key is not None:
        return None
    return "W&B has no API key, and would ask for it", "set WANDB_API_KEY, or WANDB_MODE=offline"


def _mlflow_fault() -> tuple[str, str] | None:
    """Refuse mlflow-skinny where MLflow would need its database: it comes without one."""
    if os.environ.get("MLFLOW_TRACKING_URI") or find_spec("sqlalchemy") is not None:
        return None
    return "the installed mlflow-skinny has no database", "pip install mlflow, or set MLFLOW_TRACKING_URI"


def _swanlab_fault() -> tuple[str, str] | None:
    """Refuse SwanLab if it finds no account but needs one, or has no dashboard in its mode `local`."""
    swanlab: Any = importlib.import_module("swanlab")
    settings = swanlab.Settings()
    if settings.mode == "online" and not settings.api_key:
        return "SwanLab has no API key", "set SWANLAB_API_KEY, or SWANLAB_MODE=offline"
    if settings.mode == "local" and find_spec("swanboard") is None:
        return "its mode local needs swanboard", "pip install 'swanlab[dashboard]', or set SWANLAB_MODE=offline"
    return None


@dataclass(frozen=True, kw_only=True)
class TrackerFacts:
    """The facts about one tracker."""

    tracker: str
    """The dotted path of its class, a `slime.observability.trackers.Tracker`."""
    package: str | None = None
    """The package that has to be installed, which is also the name of slime's extra; None: there is none."""
    fault: Callable[[], tuple[str, str] | None] = lambda: None
    """Returns rule and remedy if the installed package cannot be used, for example without an account."""
    files: tuple[str, ...] = ()
    """Patterns of what it leaves in the run's directory."""
    switch: str | None = None
    """The name of a switch that does the same as the tracker's name in --trackers."""


TRACKERS: Mapping[str, TrackerFacts] = {
    "tensorboard": TrackerFacts(
        tracker="slime.observability.trackers.TensorBoard",
        package="tensorboard",
        files=("tensorboard", "events.out.tfevents.*"),
        switch="use_tensorboard",
    ),
    "wandb": TrackerFacts(
        tracker="slime.observability.trackers.WeightsAndBiases",
        package="wandb",
        fault=_wandb_fault,
        files=("wandb",),
        switch="use_wandb",
    ),
    "mlflow": TrackerFacts(
        tracker="slime.observability.mlflow_tracker.MLflow",
        package="mlflow",
        fault=_mlflow_fault,
        files=("mlflow.db*", "mlflow-artifacts"),
    ),
    "trackio": TrackerFacts(tracker="slime.observability.trackio_tracker.Trackio", package="trackio"),
    "swanlab": TrackerFacts(
        tracker="slime.observability.swanlab_tracker.SwanLab",
        package="swanlab",
        fault=_swanlab_fault,
        files=("swanlab",),
    ),
}
"""Every tracker by its name."""
