"""Cluster: the verbs of the training loop, `generate`, `train`, `sync_weights`, `save_if_due` and others.

- Called by: `train.py` and `train_async.py` are written in these verbs. Each verb becomes calls to the actors in
  `Processes`, and records its time in the `journal`.
- Invariant: what is trained and not saved is known at any moment, so that a signal can end the run after a save.

The asynchronous loop (`generate_ahead`) generates rollout N+1 while it trains on rollout N:

    rollout manager   | generate N  | generate N+1 ............ | generate N+2 ...
                      |             ^ N is whole                ^ N+1 is whole
    loop (driver)     | wait for N  | train N | save | sync | wait  | train N+1 | save | sync | ...
    trainers          | idle        | steps   |      | send | idle  | steps     |      | send |

- The loop waits until rollout N is whole. It then starts N+1 and trains on N. If N+1 is not whole when the loop comes
  back for it, the loop waits again (`time/rollout_waited`); the rest of the generation time was hidden by training
  (`time/rollout_hidden`).
- The rollout manager waits for the loop's next call, so it is at most one rollout ahead. Until the weight sync, N+1 is
  generated with weights that lack the steps on rollout N: it is off-policy by one version.
- The weight sync waits for the requests of N+1 as --update-weight-pause chooses: until the whole rollout is there
  (drain), or until they are aborted (abort) or paused (in_place, retract), and then they continue with new weights.
- With --deterministic a checkpoint waits until N+1 is whole, because half a rollout cannot be continued bit by bit.

In both loops an evaluation runs while the next rollout is generated, by the same engines with the same weights:

    rollout manager   | generate N |       | evaluate, generate N+1 |
    loop (driver)     | wait       | train | wait for both          | train ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slime.cluster.actors import Processes
from slime.cluster.engines.colocation import DedicatedDevices
from slime.cluster.engines.weight_sync import EngineWeightSync
from slime.cluster.life.ending import Outcome
from slime.cluster.life.stop import Stop, StopNoticed
from slime.cluster.loop.evaluations import Evaluations, EvaluationSchedule
from slime.cluster.loop.journal import Journal
from slime.cluster.loop.loop_state import Generation, Trained
from slime.cluster.loop.progress_poll import ProgressPoll
from slime.cluster.loop.saving import Saving
from slime.config.args import Args
from slime.core.errors import RunError
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console.run_console import RunConsole
from slime.observability.metrics_log import MetricsLog
from slime.rollout.ahead import OneAhead

logger = logging.getLogger(__name__)

RESCUE_S = 60.0
"""Seconds that a checkpoint gets to become complete after an error."""
POLL_LIVE_S, POLL_PLAIN_S = 1.0, 5.0
"""Seconds between two questions about the rollout manager's progress, for a live view and for a plain log."""


class Cluster:
    """The verbs of the training loop, on a cluster that runs (see `running.running_cluster`)."""

    def __init__(
        self,
        args: Args,
        *,
        stop: Stop,
        processes: Processes,
        memory: DedicatedDevices,
        metrics: MetricsLog,
        console: RunConsole,
        best: BestCheckpoint | None,
        rollouts: range,
        policy_version: int,
    ) -> None:
        """`rollouts` are the ids of the rollouts that are left. No engine has weights newer than `policy_version`."""
        self._args = args
        self._stop = stop
        self._processes = processes
        self._waiter = processes.waiter
        self._memory = memory
        self._console = console
        self._best = best
        self._first, self._last = rollouts.start, rollouts.stop
        self._policy_version = policy_version
        self._journal = Journal(metrics, console, take_peaks=self._take_peaks, gap_alarm=args.logprob_gap_alarm)
        self._weight_sync = EngineWeightSync(processes, memory, console.say)
        self._saving = Saving(
            args, processes=processes, journal=self._journal, console=console, best=best, last_rollout=rollouts.stop - 1
        )
        self._evaluation_due = EvaluationSchedule(args, rollouts)
        self._evaluations = Evaluations(args, processes, look_after=self._weight_sync.look_after)
        self._ahead = OneAhead(self._begin_generation, args, last=rollouts.stop)
        self._unsaved: Trained | None = None
        self._synced = False
        self._done = rollouts.start
        """The number of rollouts that are done, also before a resume."""
        processes.waiter.heed(stop, console.say)
        if processes.has_engines:
            poll = ProgressPoll(
                processes.manager,
                show=console.progress,
                warn=console.say,
                every=POLL_LIVE_S if console.in_terminal else POLL_PLAIN_S,
            )
            self._waiter.between = poll.look

    def rollouts(self) -> Iterator[int]:
        """Yield the ids of the rollouts that are left; each iteration is one step of the clock."""
        for rollout_id in range(self._first, self._last):
            self._journal.begin(rollout_id)
            self._finish_save(wait=False)
            yield rollout_id
            times = self._journal.close()
            self._done = rollout_id + 1
            if self._unsaved is not None:
                self._unsaved.times = times
            self._journal.end(rollout_id, times)

    def outcome(self, seconds: float, *, loaded: str | None) -> Outcome:
        """Return what the run has done in `seconds`, for its closing lines; `loaded` names its first weights."""
        self._journal.close()
        return Outcome(
            first=min(self._first, self._done),
            done=self._done,
            total=self._last,
            seconds=seconds,
            times=self._journal.times,
            saved=self._saving.newest,
            loaded=loaded,
        )

    def generate(self, rollout_id: int) -> list[Any]:
        """Generate and judge a rollout; return references to each data-parallel rank's part, in Ray's object store."""
        self._stop_here()
        with self._journal.measured_elsewhere("generation", f"rollout {rollout_id}") as seconds:
            this = self._begin_generation(rollout_id)
            metrics = self._report_of(this)
            seconds["generation"] = metrics.pop("time/generation", 0.0)
            seconds["reward"] = metrics.pop("time/reward", 0.0)
        self._journal.add("generation", metrics)
        self._finish_save(wait=False)
        self._finish_evaluation()
        return this.parts

    def generate_ahead(self, rollout_id: int) -> list[Any]:
        """Wait for this rollout, start generating the next one, and return this one's parts like `generate`."""
        this = self._ahead.take(rollout_id)
        assert this.rollout_id == rollout_id, "the loop takes one rollout after the other"
        metrics = self._wait_for(this)
        self._stop_here()
        self._ahead.follow(rollout_id)
        for inside in ("time/generation", "time/reward"):  # the step's clock holds the time that the loop waited
            metrics.pop(inside, None)
        waited = min(this.waited, metrics["time/rollout"])
        metrics |= {"time/rollout_waited": waited, "time/rollout_hidden": metrics["time/rollout"] - waited}
        self._journal.add("generation", metrics)
        self._finish_save(wait=False)
        self._finish_evaluation()
        return this.parts

    def _begin_generation(self, rollout_id: int) -> Generation:
        parts, report = self._processes.generate(rollout_id)
        self._waiter.watch(f"rollout {rollout_id}: generation", report)
        return Generation(rollout_id, parts, report)

    def _wait_for(self, generation: Generation) -> dict[str, float]:
        """Return the metrics of the rollout once it is whole."""
        start = time.perf_counter()
        with self._journal.phase("generation", f"rollout {generation.rollout_id}"):
            metrics = self._report_of(generation)
        generation.waited += time.perf_counter() - start
        return metrics

    def _report_of(self, generation: Generation) -> dict[str, float]:
        """Wait for the rollout's metrics. A signal aborts it, unless that would break --deterministic (see `stop`)."""
        phase, look_after = f"rollout {generation.rollout_id}: generation", self._weight_sync.look_after
        may_abort = self._ahead.settled is not generation
        try:
            return self._waiter.get(phase, [generation.report], meanwhile=look_after, give_up=may_abort)[0]
        except StopNoticed:
            if self._abort(generation):
                self._stop_here()
            return self._waiter.get(phase, [generation.report], meanwhile=look_after)[0]

    def _abort(self, generation: Generation) -> bool:
        """Abort the generation of a rollout; return False if it is whole already."""
        self._waiter.unwatch(generation.report)
        phase = f"rollout {generation.rollout_id}: aborting the generation"
        return self._waiter.get(phase, [self._processes.manager.abort.remote(generation.rollout_id)])[0]

    def _stop_here(self) -> None:
        """End the run if a signal asks for it, after a save of what is trained and not saved. Raises Stopped."""
        if self._stop.asked is None:
            return
        self._evaluations.abort()
        if self._unsaved is not None:
            self._settle_ahead()
            self._memory.to_trainers()
            self._save(self._unsaved, export=False)
        self._finish_save(wait=True)
        self._stop.let_go(None)

    def _settle_ahead(self) -> None:
        """Prepare the rollout ahead for a save: wait until it is whole with --deterministic, and let a signal abort it.

        After a resume, the other half of a rollout would come from newer weights.
        """
        if self._ahead.settled is not None:
            self._wait_for(self._ahead.settled)
        elif self._ahead.current is not None and self._stop.asked is not None:
            self._abort(self._ahead.current)

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Move the memory of colocated engines to the trainers; the next weight sync takes it back."""
        with self._journal.phase("offload", "engines and trainers"):
            self._memory.to_trainers()
        yield

    def train(self, rollout_id: int, parts: list[Any]) -> None:
        """Take one rollout's optimizer steps on all ranks; each gets its data-parallel rank's part."""
        trainers = self._processes.trainers
        if self._saving.enabled:
            self._stop.hold()
        with self._journal.measured_elsewhere("training", f"rollout {rollout_id}") as seconds:
            each = zip(trainers, self._processes.of_trainers(parts), strict=True)
            training = [trainer.train.remote(rollout_id, part) for trainer, part in each]
            results = self._waiter.get(f"rollout {rollout_id}: training", training)
            if results:
                seconds["training"] = results[0].pop("time/training")
                self._journal.add("training", results[0])
        self._unsaved = Trained(rollout_id, self._policy_version) if self._saving.enabled else None
        self._weight_sync.trained()
        self._journal.trained(rollout_id)

    def save_if_due(self, rollout_id: int) -> None:
        """Save a checkpoint when the schedule says so, after the last rollout, and if a signal asks to stop."""
        due = self._saving.due(rollout_id)
        if self._unsaved is None or not (due or self._stop.asked):
            return
        self._settle_ahead()
        self._save(self._unsaved, export=due)

    def _save(self, trained: Trained, *, export: bool) -> None:
        """Begin to save the state after `trained`; a signal ends the run once it is complete."""
        self._finish_save(wait=True)
        self._saving.begin(trained, export=export)
        self._unsaved = None
        self._finish_save(wait=self._stop.asked is not None)

    def _finish_save(self, *, wait: bool) -> None:
        """Note a checkpoint that is complete now; if nothing else is to be saved, a signal ends the run."""
        path = self._saving.finish(wait=wait)
        if path is not None and self._unsaved is None:
            self._stop.let_go(path)

    @contextmanager
    def last_save(self) -> Iterator[None]:
        """Wait for the last checkpoint at the end of the block, also for some time after an error."""
        try:
            yield
        except RunError:
            self._waiter.set_limit(RESCUE_S, because="after an error")
            try:
                self._saving.finish(wait=True)
            except RunError as error:
                logger.warning("the last checkpoint was not completed: %s", error)
            raise
        self._finish_save(wait=True)

    def sync_weights(self) -> None:
        """Send the actor's weights to every engine, as the next policy version.

        With --update-weight-pause drain, a rollout in flight is generated to its end first.
        """
        processes = self._processes
        self._finish_save(wait=False)
        self._policy_version += 1
        if not self._args.num_engines or not processes.trainers:
            return
        if self._ahead.drained is not None:
            self._wait_for(self._ahead.drained)
            self._stop_here()
        if self._synced:
            self._send_weights()
            return
        checked = " (checked)" if self._args.check_weight_sync else ""
        with self._console.stage(f"first weight sync{checked}"):
            self._send_weights()
        self._synced = True

    def _send_weights(self) -> None:
        where = f"policy version {self._policy_version}"
        with self._journal.phase("offload", where):
            self._memory.to_weights()
            # Start measuring here: what a trainer has given back was never there with an engine's.
            self._take_peaks()
        with self._journal.phase("weight_sync", where):
            report = self._weight_sync.send(self._policy_version)
        self._journal.synced(report)
        with self._journal.phase("offload", where):
            self._memory.to_engines()
            self._take_peaks()

    def _take_peaks(self) -> list[dict[str, float]]:
        """Return every trainer's peak memory since the last call."""
        asking = [trainer.peak_memory.remote() for trainer in self._processes.trainers]
        return self._waiter.get("measuring memory", asking)

    def evaluate_before_first(self) -> None:
        """Evaluate before the first rollout; after a resume, run the evaluation that was due at the checkpoint."""
        if self._evaluation_due.due_before_first():
            self._evaluate(self._first)

    def evaluate_if_due(self, rollout_id: int) -> None:
        """Evaluate every --eval-interval rollouts, and after the last."""
        if self._evaluation_due.due(rollout_id):
            self._evaluate(rollout_id + 1)

    def _evaluate(self, step: int) -> None:
        """Begin an evaluation; wait for it only if no rollout is generated at the same time."""
        self._stop_here()
        if not self._evaluations.begin(step) or step >= self._last:
            self._finish_evaluation(give_up=True)

    def _finish_evaluation(self, *, give_up: bool = False) -> None:
        """Wait for the evaluation that runs, if there is one, and record it; `give_up` lets a signal abort it."""
        running = self._evaluations.running
        if running is None:
            return
        with self._journal.phase("evaluation", running.phase):
            try:
                metrics = self._evaluations.wait(give_up=give_up)
            except StopNoticed:
                self._stop_here()
                raise
        metrics = self._journal.evaluated(running.step, metrics)
        if self._best is not None:
            self._finish_save(wait=True)  # the weights that were evaluated are in it
            self._best.evaluated(metrics, step=running.step)
