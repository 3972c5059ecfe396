"""Which checkpoint was evaluated best: best_checkpoint.json beside the checkpoints.

Path: the driver tells of each save and each evaluation; `megatron.checkpoint_files` removes no checkpoint that is named
here. Invariant: it names a checkpoint whose own weights were evaluated, and no other of this run was evaluated better;
the earlier one stays where two are alike.

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
    """`rollout_id`: the last rollout that its weights were trained on."""

    metric: str
    value: float
    rollout_id: int
    checkpoint: str


def read_best(save_dir: Path) -> Best | None:
    """None where nothing is recorded, or what is has been removed since.

    Raises:
        ValueError: the file is not what was written.
    """
    file = save_dir / FILE
    if not file.is_file():
        return None
    try:
        best = Best(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the best checkpoint is found anew") from error
    return best if (save_dir / best.checkpoint).is_dir() else None


class BestCheckpoint:
    """The record of one run under `save_dir`, for --keep-best-checkpoint `metric`; a larger value is better.

    Raises:
        RunError: the record of the run that goes on cannot be read.
    """

    def __init__(self, save_dir: Path, metric: str, *, say: Callable[[str], None]) -> None:
        self._save_dir, self._metric, self._say = save_dir, metric, say
        self._saved: Path | None = None
        self._step = 0
        try:
            self._best = read_best(save_dir)
        except ValueError as error:
            raise RunError(str(error)) from error
        if self._best is not None and self._best.metric != metric:
            say(f"{save_dir / FILE} is of {self._best.metric}: the best checkpoint is found anew, by {metric}")
            self._best = None

    def saved(self, checkpoint: Path, *, step: int) -> None:
        """`checkpoint` holds the weights after `step` rollouts."""
        self._saved, self._step = checkpoint, step

    def evaluated(self, metrics: Mapping[str, float], *, step: int) -> None:
        """The weights after `step` rollouts were evaluated.

        Where responses failed and the metric is missing, these weights are not compared with others.

        Raises:
            RunError: the metric is not among what was evaluated.
        """
        if self._metric not in metrics and metrics.get(f"{self._metric.rpartition('/')[0]}/failed"):
            self._say(
                f"WARNING the evaluation after {step} rollouts has no {self._metric}, for responses failed: its "
                "checkpoint is not among the best"
            )
            return
        if self._metric not in metrics:
            names = ", ".join(sorted(name for name in metrics if name.startswith("eval/")))
            raise RunError(
                f"--keep-best-checkpoint {self._metric}: the evaluation after {step} rollouts has no such metric "
                f"(pass@K stands only where every reward says right or wrong); name one of {names}"
            )
        value = metrics[self._metric]
        if self._saved is None or self._step != step or not math.isfinite(value):
            return
        if self._best is None or value > self._best.value:
            self._best = Best(self._metric, value, step - 1, self._saved.name)
            self._write(self._best)
            self._say(f"best checkpoint so far: {self._saved} ({self._metric} {value:.4g})")

    def _write(self, best: Best) -> None:
        """By a rename: whoever reads it finds the old one or the new one."""
        written = self._save_dir / f".tmp_{FILE}"
        with written.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(best)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        written.rename(self._save_dir / FILE)
