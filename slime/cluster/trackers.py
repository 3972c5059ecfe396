"""The trackers that a run's flags ask for.

Path: the cluster starts them when the run is accepted, and gives them to `MetricsLog`. Invariant: one run, one name,
in all of them and over resumes.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from slime.config.args import Args
from slime.config.dump import dump_args
from slime.observability.trackers import TensorBoard, Tracker, WandbRun, WeightsAndBiases


def start_trackers(args: Args, run_id: str, first: int) -> list[Tracker]:
    """`run_id`: the same when a run goes on; `first`: the step that it goes on from.

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
