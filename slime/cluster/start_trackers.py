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
        assert args.tensorboard_dir is not None, "resolving the arguments sets it"
        trackers.append(TensorBoard(Path(args.tensorboard_dir) / run_id, first))
    if args.use_wandb:
        assert args.log_dir is not None, "resolving the arguments sets it"
        run = WandbRun(
            project=args.wandb_project,
            entity=args.wandb_entity,
            group=args.wandb_group,
            name=args.wandb_exp_name,
            directory=Path(args.log_dir),
            config=yaml.safe_load(dump_args(args)),
        )
        trackers.append(WeightsAndBiases(run, run_id, first))
    return trackers
