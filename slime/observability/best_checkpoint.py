"""The checkpoint with the best evaluation so far: best_checkpoint.json, next to the checkpoints.

- Used by: the driver reports each save and each evaluation; `megatron.checkpoint.files` never removes the checkpoint
  that the file names.
- Invariant: the file names a checkpoint whose own weights were evaluated, and none of this run was evaluated better. Of
  two equal ones, the earlier stays.

    {"metric": "eval/aime/reward", "value": 0.41, "rollout_id": 19, "checkpoint": "iter_0000019"}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slime.core.errors import RunError

FILE = "best_checkpoint.json"


@dataclass(frozen=True)
class Best:
    """The record in the file. `rollout_id` is the last rollout that the weights were trained on."""

    metric: str
    value: float
    rollout_id: int
    checkpoint: str


def read_best(save_dir: Path) -> Best | None:
    """Return the record; None if there is none, or if its checkpoint has been removed since.

    Raises:
        ValueError: the file is damaged.
    """
    file = save_dir / FILE
    if not file.is_file():
        return None
    try:
        best = Best(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the search starts again") from error
    return best if (save_dir / best.checkpoint).is_dir() else None


class BestCheckpoint:
    """The record of one run under `save_dir`, for --keep-best-checkpoint `metric`.

    A larger value is better, or a smaller one of a loss: eval/NAME/loss and eval/NAME/loss_per_sample.

    Raises:
        RunError: the record of a resumed run cannot be read.
    """

    def __init__(self, save_dir: Path, metric: str, *, say: Callable[[str], None]) -> None:
        self._save_dir, self._metric, self._say = save_dir, metric, say
        self._sign = -1 if metric.rpartition("/")[2] in ("loss", "loss_per_sample") else 1
        self._saved: Path | None = None
        self._step = 0
        try:
            self._best = read_best(save_dir)
        except ValueError as error:
            raise RunError(str(error)) from error
        if self._best is not None and self._best.metric != metric:
            say(f"{save_dir / FILE} is for {self._best.metric}: the search starts again, by {metric}")
            self._best = None

    def saved(self, checkpoint: Path, *, step: int) -> None:
        """Note that `checkpoint` has the weights after `step` rollouts."""
        self._saved, self._step = checkpoint, step

    def evaluated(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Compare the evaluation of the weights after `step` rollouts with the best one so far.

        If responses failed and the metric is missing, these weights are not compared.

        Raises:
            RunError: the evaluation has no such metric.
        """
        if self._metric not in metrics and metrics.get(f"{self._metric.rpartition('/')[0]}/failed"):
            self._say(
                f"WARNING the evaluation after {step} rollouts has no {self._metric}, because responses failed: its "
                "checkpoint is not compared with the best"
            )
            return
        if self._metric not in metrics:
            names = ", ".join(sorted(name for name in metrics if name.startswith("eval/")))
            raise RunError(
                f"--keep-best-checkpoint {self._metric}: the evaluation after {step} rollouts has no such metric "
                f"(pass@K exists only if all rewards are 0 or 1, or all are -1 or 1); name one of {names}"
            )
        value = metrics[self._metric]
        if self._saved is None or self._step != step or not math.isfinite(value):
            return
        if self._best is None or self._sign * value > self._sign * self._best.value:
            self._best = Best(self._metric, value, step - 1, self._saved.name)
            self._write(self._best)
            self._say(f"best checkpoint so far: {self._saved} ({self._metric} {value:.4g})")

    def _write(self, best: Best) -> None:
        """Write by a rename, so that a reader finds either the old record or the new one."""
        written = self._save_dir / f".tmp_{FILE}"
        with written.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(best)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        written.rename(self._save_dir / FILE)
