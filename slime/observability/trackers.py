"""Weights & Biases and TensorBoard: the numbers of metrics.jsonl, where people look at them.

- Used by: `MetricsLog`, which passes every event on to the trackers that the run uses.
- Invariant: metrics.jsonl is the complete record. When a run starts or resumes, a tracker receives from it what it
  lacks; it gets no step twice, and its errors never end a run.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slime.core.errors import RunError

logger = logging.getLogger(__name__)

Record = Mapping[str, float | int | str]

FINISH_TIMEOUT_S = 120.0
"""Seconds that W&B may take to upload the rest when the run ends."""


class Tracker(Protocol):
    """A destination for events. Those before the step `begin` are already there and cannot be sent again."""

    name: str
    begin: int

    def write(self, step: int, metrics: Record) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def _numbers(metrics: Record) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


class TensorBoard:
    """Event files in a directory of the run. When a run resumes, what was written after the checkpoint is purged."""

    name = "TensorBoard"

    def __init__(self, directory: Path, first: int) -> None:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        self.begin = first if any(directory.glob("events.out.tfevents.*")) else 0
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=self.begin)

    def write(self, step: int, metrics: Record) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run has everything

    def close(self, *, failed: bool) -> None:
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """The place of a run in W&B; None: W&B decides. `config` has the run's arguments."""

    project: str | None
    entity: str | None
    group: str | None
    name: str | None
    directory: Path
    config: dict[str, Any]


class WeightsAndBiases:
    """One W&B run with one row for each step. W&B cannot take rows back: if a step is done twice, its first row stays.

    Server and account come from W&B's own environment variables (WANDB_API_KEY, WANDB_MODE, WANDB_BASE_URL, ...).
    Offline, every start writes the whole run again, to be synced alone. `run_id` is the same when a run resumes;
    `first` is the step from which it resumes.

    Raises:
        RunError: W&B cannot be reached, or refuses the run.
    """

    name = "Weights & Biases"

    def __init__(self, run: WandbRun, run_id: str, first: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                id=run_id,
                resume="allow",
                project=run.project,
                entity=run.entity,
                group=run.group,
                name=run.name,
                dir=str(run.directory),
                config=run.config,
                # W&B must not capture the run's console; what it cannot upload in time stays on the disk
                settings=wandb.Settings(console="off", finish_timeout=FINISH_TIMEOUT_S),
            )
        except (wandb.Error, OSError) as error:
            remedy = "check the network and WANDB_API_KEY, or set WANDB_MODE=offline"
            raise RunError(f"--use-wandb: the run cannot be started there ({error}); {remedy}") from error
        self._first = first
        self.begin: int = self._run.starting_step
        if self.begin > first > 0:
            logger.warning("W&B already has steps %d to %d, and keeps their first rows", first, self.begin - 1)

    def write(self, step: int, metrics: Record) -> None:
        # A row is sent when its step is over, and a step ends with its times. The first step of a resumed run is an
        # exception: an evaluation that was due at the checkpoint still belongs to it.
        over = "time/step" in metrics and step > self._first
        self._run.log(_numbers(metrics), step=step, commit=over)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
