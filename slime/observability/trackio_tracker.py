"""Trackio as a tracker: on this machine, or where Trackio's own environment variables say.

- Used by: its row in `slime.config.experiment_trackers`; the interface is `slime.observability.trackers.Tracker`.
- Invariant: each step is sent once.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from slime.observability.samples_file import COLUMNS, Row, table
from slime.observability.trackers import RowTracker, TrackedRun


class Trackio(RowTracker):
    """One Trackio run in the project `slime`. Trackio cannot take rows back: if a step is done twice, its first stays.

    TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL name the place; without them it is Trackio's own folder.
    """

    name = "Trackio"

    def __init__(self, trackio_run: Any, first: int) -> None:
        """`trackio_run` is Trackio's own object, and `first` the step from which the run resumes."""
        self._run = trackio_run
        super().__init__(first, int(trackio_run._next_step))

    @classmethod
    def start(cls, run: TrackedRun) -> Trackio:
        """Open the run, or continue it if it is there."""
        trackio: Any = importlib.import_module("trackio")
        try:
            theirs = trackio.init(
                project="slime",
                name=run.run_id,
                resume="allow",
                config={name: value for name, value in run.config.items() if not name.startswith("_")},
                embed=False,
                auto_log_cpu=False,  # a thread that would log rows of its own
                auto_log_gpu=False,
            )
        except Exception as error:  # (whatever Trackio, SQLite or the network raise)
            raise run.refused(error, "check TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL") from error
        return cls(theirs, run.first)

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=step)

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:
        trackio: Any = importlib.import_module("trackio")
        # in the step's own row: Trackio has every step of which it has anything, and gets no second row of it
        self.add(step, {f"samples/{split}": trackio.Table(columns=list(COLUMNS), data=table(rows))})

    def close(self, *, ok: bool) -> None:
        self._run.finish()
