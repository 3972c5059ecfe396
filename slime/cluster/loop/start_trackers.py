"""Start the trackers that a run's flags request.

- Called by: the cluster, when the run is accepted; it passes them to `MetricsLog`.
- Invariant: a run has one name, the same in all trackers and over resumes.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.experiment_trackers import TRACKERS
from slime.core.plugins import load_class
from slime.observability.trackers import TrackedRun, Tracker


def start_trackers(args: Args, run_id: str, first: int) -> list[Tracker]:
    """Return the trackers. `run_id` is the same when a run resumes; `first` is the step from which it resumes.

    Raises:
        RunError: a tracker's service cannot be reached, or refuses.
        ValueError: the row of a tracker names no Tracker.
    """
    names, config = args.tracker_names, yaml.safe_load(dump_args(args))
    classes = [load_class(TRACKERS[name].tracker, Tracker, chosen_by=f"--trackers {name}") for name in names]
    trackers: list[Tracker] = []
    for name, kind in zip(names, classes, strict=True):
        switch = TRACKERS[name].switch
        flag = f"--trackers {name}" if switch is None or name in args.trackers else f"--{switch.replace('_', '-')}"
        run = TrackedRun(
            run_id=run_id,
            first=first,
            directory=Path(args.resolved.log_dir),
            config=config,
            flag=flag,
        )
        trackers.append(kind.start(run))
    return trackers
