"""Weights & Biases and TensorBoard: the numbers of metrics.jsonl, where people look at them.

Path: `MetricsLog` hands every event on to the trackers that the run asked for. Invariant: metrics.jsonl is the truth;
a tracker is told from it what it lacks when the run starts or goes on, has no step twice, and never ends a run.
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
"""How long W&B may take to upload the rest when the run ends."""


class Tracker(Protocol):
    """`begin`: events before this step are there already, and cannot be told again."""

    name: str
    begin: int

    def write(self, step: int, metrics: Record) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def _numbers(metrics: Record) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


class TensorBoard:
    """Event files in a directory of the run's own; going on purges what was written behind the checkpoint."""

    name = "TensorBoard"

    def __init__(self, directory: Path, first: int) -> None:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        self.begin = first if any(directory.glob("events.out.tfevents.*")) else 0
        self._writer = tensorboard.SummaryWriter(str(directory), purge_step=self.begin)

    def write(self, step: int, metrics: Record) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run has everything

    def close(self, *, failed: bool) -> None:
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """Where a run stands in W&B; None: as W&B decides. `config`: the run's arguments."""

    project: str | None
    entity: str | None
    group: str | None
    name: str | None
    directory: Path
    config: dict[str, Any]


class WeightsAndBiases:
    """One W&B run with one row a step. It takes nothing back: of steps done twice, the first account stands.

    Where and as whom is said by W&B's own environment variables (WANDB_API_KEY, WANDB_MODE, WANDB_BASE_URL, ...).
    Offline, every start writes the whole run anew, to be synced alone. `run_id`: the same when a run goes on; `first`:
    the step that it goes on from.

    Raises:
        RunError: it cannot be reached, or refuses.
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
                # the console is the run's own; what W&B cannot upload in time stays on the disk
                settings=wandb.Settings(console="off", finish_timeout=FINISH_TIMEOUT_S),
            )
        except (wandb.Error, OSError) as error:
            remedy = "see to the network and WANDB_API_KEY, or set WANDB_MODE=offline"
            raise RunError(f"--use-wandb: the run cannot be started there ({error}); {remedy}") from error
        self._first = first
        self.begin: int = self._run.starting_step
        if self.begin > first > 0:
            logger.warning("W&B has steps %d to %d already: their first account stands there", first, self.begin - 1)

    def write(self, step: int, metrics: Record) -> None:
        # A row is sent when its step is over, and the times close a step. The first step of a run that goes on is
        # an exception: an evaluation that was due at the checkpoint still belongs to it.
        over = "time/step" in metrics and step > self._first
        self._run.log(_numbers(metrics), step=step, commit=over)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
