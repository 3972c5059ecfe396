"""SwanLab as a tracker: at its server, or in files of the run that `swanlab sync` sends later.

- Used by: its row in `slime.config.experiment_trackers`; the interface is `slime.observability.trackers.Tracker`.
- Invariant: each metric has each step once; SwanLab itself leaves out the steps that it has.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from slime.observability.samples_file import Row
from slime.observability.trackers import Record, TrackedRun, Tracker, as_markdown, numbers


class SwanLab(Tracker):
    """One SwanLab run. If a step is done twice, SwanLab keeps its first value.

    Mode, server and account come from SwanLab's own environment variables (SWANLAB_MODE, SWANLAB_API_KEY, ...).
    Offline, every start writes the whole run again, to be synced alone.
    """

    name = "SwanLab"

    def __init__(self, swanlab_run: Any) -> None:
        """`swanlab_run` is SwanLab's own object."""
        self._run = swanlab_run

    @classmethod
    def start(cls, run: TrackedRun) -> SwanLab:
        """Open the run, or continue it at the server if it is there; SWANLAB_PROJ_NAME names the project."""
        swanlab: Any = importlib.import_module("swanlab")
        own = swanlab.Settings()
        try:
            theirs = swanlab.init(
                id=run.run_id,
                resume="allow",
                project=own.project.name or "slime",
                name=own.experiment.name or run.run_id,
                log_dir=str(run.directory / "swanlab"),
                config=dict(run.config),
                # SwanLab must not capture the run's console, nor write down its command line with its secrets
                settings=swanlab.Settings(
                    terminal=swanlab.Settings.Terminal(proxy_type="none"),
                    probe=swanlab.Settings.Probe(monitor=False, runtime=False),
                ),
            )
        except Exception as error:  # (SwanLab raises many kinds)
            raise run.refused(error, "check the network and SWANLAB_API_KEY, or set SWANLAB_MODE=offline") from error
        return cls(theirs)

    def log(self, step: int, metrics: Record) -> None:
        self._run.log(numbers(metrics), step=step)

    def log_samples(self, step: int, split: str, rows: Sequence[Row]) -> None:
        swanlab: Any = importlib.import_module("swanlab")
        texts = [swanlab.Text(as_markdown([row]), caption=f"{row.get('group')}.{row.get('index')}") for row in rows]
        self._run.log({f"samples/{split}": texts}, step=step)

    def finish(self, *, ok: bool) -> None:
        if ok:
            self._run.finish()
        else:
            self._run.finish(state="crashed", error="the run ended with an error")
