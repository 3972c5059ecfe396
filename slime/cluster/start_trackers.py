"""Start the trackers that a run's flags request.

- Called by: the cluster, when the run is accepted; it passes them to `MetricsLog`.
- Invariant: a run has one name, the same in all trackers and over resumes.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.observability.trackers import TensorBoard, Tracker, WandbRun, WeightsAndBiases


def start_trackers(args: Args, run_id: str, first: int) -> list[Tracker]:
    """Return the trackers. `run_id` is the same when a run resumes; `first` is the step from which it resumes.

    Raises:
        RunError: Weights & Biases cannot be reached, or refuses.
    """
    trackers: list[Tracker] = []
    if args.use_tensorboard:
        trackers.append(TensorBoard(Path(args.resolved.tensorboard_dir) / run_id, first))
    if args.use_wandb:
        run = WandbRun(
            project=args.wandb_project,
            entity=args.wandb_entity,
            group=args.wandb_group,
            name=args.wandb_exp_name,
            directory=Path(args.resolved.log_dir),
            config=yaml.safe_load(dump_args(args)),
        )
        trackers.append(WeightsAndBiases(run, run_id, first))
    return trackers
