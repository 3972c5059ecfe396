"""Restart a run after a fault, from its last complete checkpoint and a limited number of times.

- Called by: `main`, with the training loop (the "story"). Each attempt is a cluster of its own.
- Invariant: only a lost process (`Fault`) leads to another attempt. What a process has refused (a flag, a file, a full
  disk) would be refused again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from slime.cluster.life.stop import Stop
from slime.cluster.running import running_cluster
from slime.config.args import Args
from slime.core.checkpoint_names import newest_checkpoint
from slime.core.errors import Fault
from slime.core.verbs import Story
from slime.observability.console.lines import count

logger = logging.getLogger(__name__)


@dataclass
class Restarts:
    """Counts the restarts of a run: at most `limit` in a row without a checkpoint newer than `newest`."""

    limit: int
    newest: int | None
    in_a_row: int = 0
    total: int = 0

    def allow(self, newest: int | None) -> bool:
        """Return whether the run may be started again, and count it; `newest` is the checkpoint that it has now."""
        if newest != self.newest:
            self.newest, self.in_a_row = newest, 0
        if self.in_a_row == self.limit:
            return False
        self.in_a_row += 1
        self.total += 1
        return True


def run_with_restarts(args: Args, story: Story, stop: Stop, *, begin: float, opening: str) -> None:
    """Let `story` use a cluster; after a fault, repeat that from the newest checkpoint that the run has made.

    There are at most --max-restarts attempts in a row without a new checkpoint, and none without --save, or after a
    signal has asked the run to `stop`. `begin` and `opening` are those of `running_cluster`.

    Raises:
        RunError: the error that ended the run. If it is a Fault, there was one too many.
    """
    before = newest_checkpoint(args.save)
    restarts = Restarts(args.max_restarts, before)
    while True:
        try:
            with running_cluster(args, stop, restarts=restarts.total, begin=begin, opening=opening) as cluster:
                story(cluster)
            return
        except Fault as fault:
            newest = newest_checkpoint(args.save)
            if args.save is None or stop.asked is not None or not restarts.allow(newest):
                raise
            logger.error("a fault ended the run, which is started again", exc_info=fault)
            stop.let_go(None)  # what was trained after that is lost
            if newest != before:
                args = resumed_args(args)
            at = "" if newest is None else f"from {args.save}, after {count(newest + 1, 'rollout')}"
            source = "from the beginning" if newest == before else at
            again = f"starting again {source} (restart {restarts.in_a_row} of --max-restarts {args.max_restarts})"
            print(f"FAULT {fault}\n{again}", flush=True)
            opening = again  # the fault is in the log already


def resumed_args(args: Args) -> Args:
    """Return `args` changed to continue from the run's own last checkpoint, wherever the run began."""
    bare = args.no_save_optim  # then the checkpoint holds no optimizer state
    return replace(args, load=args.save, ckpt_step=None, finetune=False, no_load_optim=bare, no_load_rng=False)
