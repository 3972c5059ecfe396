"""Restart a run after a fault, from its last complete checkpoint and a limited number of times.

- Called by: `main`, with the training loop (the "story"). Each attempt is a cluster of its own.
- Invariant: only a lost process (`Fault`) leads to another attempt. What a process has refused (a flag, a file, a full
  disk) would be refused again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from slime.cluster.cluster import Story, running_cluster
from slime.config.args import Args
from slime.core.checkpoint_names import rollout_of
from slime.core.errors import Fault

logger = logging.getLogger(__name__)


def run_with_restarts(args: Args, story: Story) -> None:
    """Let `story` use a cluster; after a fault, repeat that from the newest checkpoint that the run has made.

    There are at most --max-restarts attempts in a row without a new checkpoint, and none without --save.

    Raises:
        RunError: the error that ended the run. If it is a Fault, there was one too many.
    """
    before = newest = newest_checkpoint(args.save)
    without_progress = total = 0
    while True:
        try:
            with running_cluster(args, restarts=total) as cluster:
                story(cluster)
            return
        except Fault as fault:
            made = newest_checkpoint(args.save)
            if made != newest:
                newest, without_progress = made, 0
            if args.save is None or without_progress == args.max_restarts:
                raise
            logger.error("a fault ended the run, which is started again", exc_info=fault)
            without_progress += 1
            total += 1
            if newest != before:
                args = resumed_args(args)
            source = "from the beginning" if newest == before else f"from {args.save}, after rollout {newest}"
            print(
                f"FAULT {fault}\nstarting again {source} (restart {without_progress} of --max-restarts "
                f"{args.max_restarts})",
                flush=True,
            )


def newest_checkpoint(save: str | None) -> int | None:
    """Return the last rollout with a checkpoint in `save`; a checkpoint gets its name only when it is complete."""
    found = [] if save is None else [rollout_of(path.name) for path in Path(save).glob("iter_*")]
    return max((rollout_id for rollout_id in found if rollout_id is not None), default=None)


def resumed_args(args: Args) -> Args:
    """Return `args` changed to continue from the run's own last checkpoint, wherever the run began."""
    bare = args.no_save_optim  # then the checkpoint holds no optimizer state
    return replace(args, load=args.save, ckpt_step=None, finetune=False, no_load_optim=bare, no_load_rng=False)
