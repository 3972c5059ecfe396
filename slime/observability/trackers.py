"""Trackers: the numbers of metrics.jsonl and some of the samples, where people look at them. TensorBoard and W&B.

- Used by: `MetricsLog`, which passes every event on to the trackers that the run uses. A row of
  `slime.config.experiment_trackers` names each class; those of other trackers are in files of their own.
- Invariant: metrics.jsonl is the complete record. When a run starts or resumes, a tracker receives from it what it
  lacks; it gets no step twice, and its errors never end a run.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slime.core.errors import RunError
from slime.observability.samples_file import COLUMNS, Row, table

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
    flag: str
    """The flag that requested the tracker, for errors: `--trackers NAME` or its switch."""

    def refused(self, error: Exception, remedy: str) -> RunError:
        """Return the error of a tracker that cannot start."""
        return RunError(f"{self.flag}: the run cannot be started there ({error}); {remedy}")


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

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:  # noqa: B027 (optional)
        """Take a few rows of samples.jsonl as a table or text; a tracker that has neither ignores them."""

    @abstractmethod
    def finish(self, *, ok: bool) -> None:
        """Send the rest and close the run; `ok`: the run was not ended by an error."""


class RowTracker(Tracker):
    """A tracker that gets each step once, as one row with the numbers of all its events.

    A row is sent when its step is over, and a step ends with its times. The first step of a resumed run is an
    exception: an evaluation that was due at the checkpoint still belongs to it. Steps that the tracker has keep their
    first row.
    """

    def __init__(self, first: int, next_step: int) -> None:
        """`first` is the step from which the run resumes, and `next_step` the first one that the tracker lacks."""
        self._first, self.begin = first, next_step
        self._step, self._row = 0, dict[str, Any]()
        if next_step > first > 0:
            logger.warning("%s already has steps %d to %d, and keeps their rows", self.name, first, next_step - 1)

    def log(self, step: int, metrics: Record) -> None:
        self.add(step, numbers(metrics))
        if "time/step" in metrics and step > self._first:
            self._send()

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add to the row of `step`, and send the row of another step first."""
        if step != self._step:
            self._send()
        self._step = step
        self._row |= values

    def finish(self, *, ok: bool) -> None:
        try:
            self._send()
        finally:
            self.close(ok=ok)

    def _send(self) -> None:
        row, self._row = self._row, {}
        if row:
            self.send(self._step, row)

    @abstractmethod
    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Send the row of `step`: numbers, and what the tracker itself has added."""

    @abstractmethod
    def close(self, *, ok: bool) -> None:
        """Close the run after its last row."""


def numbers(metrics: Record) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def as_markdown(rows: Sequence[Row]) -> str:
    """Return samples as one text: a line with what is known of each, then its prompt and response as they are."""
    parts: list[str] = []
    for cells in table(rows):
        known = dict(zip(COLUMNS, cells, strict=True))
        prompt, response = known.pop("prompt"), known.pop("response")
        head = ", ".join(f"{name} {value}" for name, value in known.items() if value not in (None, "{}"))
        fence = "`" * 3
        while fence in f"{prompt}{response}":
            fence += "`"
        parts.append(f"**{head}**\n\n{fence}text\n{prompt}\n{fence}\n\n{fence}text\n{response}\n{fence}\n")
    return "\n".join(parts)


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

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:
        self._writer.add_text(f"samples/{split}", as_markdown(rows), step)

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
                resume="allow" if wandb.setup().settings.mode == "online" else None,
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
            raise run.refused(error, remedy) from error
        return cls(theirs, run.first)

    def log(self, step: int, metrics: Record) -> None:
        # A row is sent when its step is over, and a step ends with its times. The first step of a resumed run is an
        # exception: an evaluation that was due at the checkpoint still belongs to it.
        over = "time/step" in metrics and step > self._first
        self._run.log(numbers(metrics), step=step, commit=over)

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:
        wandb: Any = importlib.import_module("wandb")
        made = wandb.Table(columns=list(COLUMNS), data=table(rows), allow_mixed_types=True)
        self._run.log({f"samples/{split}": made}, step=step, commit=False)

    def finish(self, *, ok: bool) -> None:
        self._run.finish(exit_code=int(not ok))
