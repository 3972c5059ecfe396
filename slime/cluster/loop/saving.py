"""Saving: one checkpoint of the whole run, from the data side and all trainers.

- Used by: `Cluster`, when a save is due and before a signal ends the run.
- Invariant: a checkpoint and the metrics file agree: a resumed run writes all metrics after its checkpoint again. A
  checkpoint counts only once it is complete: until then it is neither the newest nor the best one, and it is not told.

    trainers    | train N | copy |  send weights  |  idle  | train N + 1 ...
    their disk            |      write N ................| N is complete
    loop        | train   | begin | sync, generate ....... | finish: "saved", or the error
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slime.cluster.actors import Processes
from slime.cluster.loop.journal import Journal
from slime.cluster.loop.loop_state import Trained
from slime.cluster.loop.save_schedule import SaveSchedule
from slime.config.args import Args
from slime.config.resuming import record_of_run
from slime.core.checkpoint_names import RUN
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console.run_console import RunConsole


class Saving:
    """The saves of a run; `last_rollout` is the id of the rollout that is always saved."""

    def __init__(
        self,
        args: Args,
        *,
        processes: Processes,
        journal: Journal,
        console: RunConsole,
        best: BestCheckpoint | None,
        last_rollout: int,
    ) -> None:
        self._args = args
        self._processes = processes
        self._journal = journal
        self._console = console
        self._best = best
        self._schedule = SaveSchedule(args, last_rollout)
        self.due = self._schedule.due
        self.enabled = args.save is not None and args.saves and bool(processes.trainers)
        """Whether this run saves anything."""
        self.newest: str | None = None
        """The last complete checkpoint of this run."""
        self._pending: int | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun, and is not known to be complete."""
        return self._pending is not None

    def begin(self, trained: Trained, *, export: bool) -> None:
        """Begin to save the state after `trained`; it is copied now, and written while the loop goes on.

        Its policy version is the one before the weights are sent. With `export` the weights are also written for
        Hugging Face, if --save-hf asks for it.
        """
        assert self._pending is None, "one checkpoint after the other"
        rollout_id, waiter, trainers = trained.rollout_id, self._processes.waiter, self._processes.trainers
        times = trained.times or self._journal.times_so_far()  # a resumed run knows only this part of the step's times
        with self._journal.phase("checkpoint", f"rollout {rollout_id}"):
            [rollout] = waiter.get("saving the data side", [self._processes.manager.state_dict.remote(rollout_id + 1)])
            state = {
                "rollout": {**rollout, "policy_version": trained.policy_version},
                "policy_version": trained.policy_version,
                "times": times,
                RUN: record_of_run(self._args, _data_of(rollout)),
            }
            # Rank 0 alone writes the state. It may hold whole rollouts, too large to send to ranks that ignore it.
            states = [state if rank == 0 else {} for rank in range(len(trainers))]
            each = zip(trainers, states, strict=True)
            saving = [trainer.save.remote(rollout_id, its, export=export) for trainer, its in each]
            waiter.get(f"rollout {rollout_id}: saving", saving)
        self._pending = rollout_id
        self._schedule.begun()

    def finish(self, *, wait: bool) -> str | None:
        """Return the path of the checkpoint that was begun, once; None if there is none, or it is not complete.

        With `wait` this waits until it is complete. Call it only while the trainers have nothing else to do.

        Raises:
            RunError: it could not be written.
        """
        if self._pending is None:
            return None
        phase, waiter, trainers = f"rollout {self._pending}: saving", self._processes.waiter, self._processes.trainers
        if not wait and waiter.get(phase, [trainers[0].is_writing.remote()])[0]:
            return None
        rollout_id, self._pending = self._pending, None  # also after an error: there is nothing more to wait for
        with self._journal.phase("checkpoint", f"rollout {rollout_id}"):
            path, seconds = waiter.get(phase, [trainer.finish_save.remote() for trainer in trainers])[0]
        self.newest = path
        self._schedule.saved(seconds)
        self._console.say(f"saved {path}")
        if self._best is not None:
            self._best.saved(Path(path), step=rollout_id + 1)
        return path


def _data_of(rollout: dict[str, Any]) -> dict[str, Any]:
    """Return the data buffer's record of its data from the rollout manager's state; empty if there is no buffer."""
    tracked: dict[str, Any] = rollout["data_source"] or {}
    return tracked.get("source", {}).get("data", {})
