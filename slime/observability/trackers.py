"""Weights & Biases and TensorBoard: the numbers of metrics.jsonl, where people look at them.

- Used by: `MetricsLog`, which passes every event on to the trackers that the run uses. A row of
  `slime.config.experiment_trackers` names each class.
- Invariant: metrics.jsonl is the complete record. When a run starts or resumes, a tracker receives from it what it
  lacks; it gets no step twice, and its errors never end a run.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slime.core.errors import RunError

logger = logging.getLogger(__name__)

Record = Mapping[str, float | int | str]

FINISH_TIMEOUT_S = 120.0
"""Seconds that W&B may take to upload the rest when the run ends."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The facts about a run that a tracker gets when it starts."""

    run_id: str
    """The name of the run, which is the same when the run resumes."""
    first: int
    """The step from which the run resumes; 0 if it is new."""
    directory: Path
    """The run's directory, --log-dir."""
    config: Mapping[str, Any]
    """All arguments by the names of their flags, without secrets."""


class Tracker(ABC):
    """A destination for events. An exception from `log` or `finish` becomes a warning and never ends the run."""

    name: ClassVar[str]
    """The name in messages."""
    begin: int = 0
    """The first step that it accepts; events of earlier steps are already there and cannot be sent again."""

    @classmethod
    @abstractmethod
    def start(cls, run: TrackedRun) -> Tracker:
        """Open the run, or continue it if it resumes.

        Raises:
            RunError: the tracker's service cannot be reached, or refuses the run.
        """

    @abstractmethod
    def log(self, step: int, metrics: Record) -> None:
        """Take one event. A step has several; the one with `time/step` is its last."""

    @abstractmethod
    def finish(self, *, ok: bool) -> None:
        """Send the rest and close the run; `ok`: the run was not ended by an error."""


def numbers(metrics: Record) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


class TensorBoard(Tracker):
    """Event files in a directory of the run. When a run resumes, what was written after the checkpoint is purged."""

    name = "TensorBoard"

    def __init__(self, directory: Path, first: int) -> None:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        self.begin = first if any(directory.glob("events.out.tfevents.*")) else 0
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=self.begin)

    @classmethod
    def start(cls, run: TrackedRun) -> TensorBoard:
        """Open the run's directory under --tensorboard-dir."""
        return cls(Path(run.config["tensorboard_dir"]) / run.run_id, run.first)

    def log(self, step: int, metrics: Record) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run has everything

    def finish(self, *, ok: bool) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """One W&B run with one row for each step. W&B cannot take rows back: if a step is done twice, its first row stays.

    Server and account come from W&B's own environment variables (WANDB_API_KEY, WANDB_MODE, WANDB_BASE_URL, ...).
    Offline, every start writes the whole run again, to be synced alone.
    """

    name = "Weights & Biases"

    def __init__(self, run: Any, first: int) -> None:
        """`run` is W&B's own object, and `first` the step from which the run resumes."""
        self._run = run
        self._first = first
        self.begin = int(run.starting_step)
        if self.begin > first > 0:
            logger.warning("W&B already has steps %d to %d, and keeps their first rows", first, self.begin - 1)

    @classmethod
    def start(cls, run: TrackedRun) -> WeightsAndBiases:
        """Open the run at W&B, in the place that the flags --wandb-* name; W&B chooses what they leave open."""
        wandb: Any = importlib.import_module("wandb")
        config = run.config
        try:
            theirs = wandb.init(
                id=run.run_id,
                resume="allow",
                project=config["wandb_project"],
                entity=config["wandb_entity"],
                group=config["wandb_group"],
                name=config["wandb_exp_name"],
                dir=str(run.directory),
                config=dict(config),
                # W&B must not capture the run's console; what it cannot upload in time stays on the disk
                settings=wandb.Settings(console="off", finish_timeout=FINISH_TIMEOUT_S),
            )
        except (wandb.Error, OSError) as error:
            remedy = "check the network and WANDB_API_KEY, or set WANDB_MODE=offline"
            raise RunError(f"--use-wandb: the run cannot be started there ({error}); {remedy}") from error
        return cls(theirs, run.first)

    def log(self, step: int, metrics: Record) -> None:
        # A row is sent when its step is over, and a step ends with its times. The first step of a resumed run is an
        # exception: an evaluation that was due at the checkpoint still belongs to it.
        over = "time/step" in metrics and step > self._first
        self._run.log(numbers(metrics), step=step, commit=over)

    def finish(self, *, ok: bool) -> None:
        self._run.finish(exit_code=int(not ok))
