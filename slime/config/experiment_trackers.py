"""The experiment trackers: one row for each, with what has to be there before a run starts.

- Used by: the choices of --trackers and the rules; `slime.cluster.start_trackers` starts the class in a row.
- Invariant: no other place lists the trackers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _wandb_fault() -> tuple[str, str] | None:
    """Refuse W&B if it finds no account in its environment variables, settings files or netrc, but needs one."""
    wandb: Any = importlib.import_module("wandb")
    if wandb.setup().settings.mode != "online" or wandb.api.api_key is not None:
        return None
    return "W&B has no API key, and would ask for it", "set WANDB_API_KEY, or WANDB_MODE=offline"


@dataclass(frozen=True, kw_only=True)
class TrackerFacts:
    """The facts about one tracker."""

    tracker: str
    """The dotted path of its class, a `slime.observability.trackers.Tracker`."""
    package: str | None = None
    """The package that has to be installed, which is also the name of slime's extra; None: there is none."""
    fault: Callable[[], tuple[str, str] | None] = lambda: None
    """Returns rule and remedy if the installed package cannot be used, for example without an account."""
    switch: str | None = None
    """The name of a switch that does the same as the tracker's name in --trackers."""


TRACKERS: Mapping[str, TrackerFacts] = {
    "tensorboard": TrackerFacts(
        tracker="slime.observability.trackers.TensorBoard", package="tensorboard", switch="use_tensorboard"
    ),
    "wandb": TrackerFacts(
        tracker="slime.observability.trackers.WeightsAndBiases",
        package="wandb",
        fault=_wandb_fault,
        switch="use_wandb",
    ),
}
"""Every tracker by its name."""
