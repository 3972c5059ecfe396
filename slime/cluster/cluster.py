"""Cluster: the verbs of the training loop, `generate`, `train`, `sync_weights`, `save_if_due` and others.

- Called by: `train.py` and `train_async.py` are written in these verbs. Each verb becomes calls to the actors in
  `Processes`, and records its time in the step's clock.
- Invariant: a checkpoint and the metrics file agree: a resumed run writes all metrics after its checkpoint again.

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
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slime.cluster.actors import Processes
from slime.cluster.engines.colocation import DedicatedDevices
from slime.cluster.engines.weight_sync import EngineWeightSync
from slime.cluster.life.ending import Outcome
from slime.cluster.life.stop import Stop, StopNoticed
from slime.cluster.loop.loop_state import Generation, Trained
from slime.cluster.loop.progress_poll import ProgressPoll
from slime.cluster.loop.save_schedule import SaveSchedule
from slime.config.args import Args
from slime.config.resuming import record_of_run
from slime.core.checkpoint_names import RUN
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console.lines import count
from slime.observability.console.run_console import RunConsole
from slime.observability.metrics_log import MetricsLog
from slime.observability.phases import StepClock, memory_record

POLL_LIVE_S, POLL_PLAIN_S = 1.0, 5.0
"""Seconds between two questions about the rollout manager's progress, for a live view and for a plain log."""


def _data_of(rollout: dict[str, Any]) -> dict[str, Any]:
    """Return the data buffer's record of its data from the rollout manager's state; empty if there is no buffer."""
    tracked: dict[str, Any] = rollout["data_source"] or {}
    return tracked.get("source", {}).get("data", {})


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
        self._metrics = metrics
        self._console = console
        self._best = best
        self._first, self._last = rollouts.start, rollouts.stop
        self._schedule = SaveSchedule(args, rollouts.stop - 1)
        self._policy_version = policy_version
        self._weight_sync = EngineWeightSync(processes, memory, console.say)
        self._clock = StepClock()
        self._record: dict[str, float] = {}
        self._sync_report: dict[str, float] = {}
        self._ahead: Generation | None = None
        self._validation_sets: Any = None
        """A reference to the rows of SFT's evaluation sets, once they are loaded."""
        self._saves = args.save is not None and args.saves and bool(processes.trainers)
        self._unsaved: Trained | None = None
        processes.waiter.heed(stop, console.say)
        self.done = rollouts.start
        """The number of rollouts that are done, also before a resume."""
        self.saved: str | None = None
        """The last checkpoint of this run."""
        self.times: Counter[str] = Counter()
        """Seconds by phase, `time/...`, of what is done."""
        self._synced = False
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
            self._next_clock()
            self._record = {}
            self._console.begin_rollout(rollout_id)
            yield rollout_id
            times = self._next_clock()
            self.done = rollout_id + 1
            if self._unsaved is not None:
                self._unsaved.times = times
            self._metrics.write(rollout_id + 1, {**times, **self._sync_report})
            self._console.rollout(rollout_id, {**self._record, **self._sync_report, **times})

    def outcome(self, seconds: float, *, loaded: str | None) -> Outcome:
        """Return what the run has done in `seconds`, for its closing lines; `loaded` names its first weights."""
        self._next_clock()
        return Outcome(
            first=min(self._first, self.done),
            done=self.done,
            total=self._last,
            seconds=seconds,
            times=self.times,
            saved=self.saved,
            loaded=loaded,
        )

    def _next_clock(self) -> dict[str, float]:
        """Begin another step of the clock, and return the times of the one that ends."""
        times = self._clock.close()
        self.times.update({name: seconds for name, seconds in times.items() if name != "time/step"})
        self._clock = StepClock()
        return times

    @contextmanager
    def _phase(self, name: str, where: str) -> Iterator[None]:
        """Count what is inside the block as a phase, and show it."""
        with self._console.phase(name, where), self._clock.phase(name):
            yield

    def generate(self, rollout_id: int) -> Any:
        """Generate and judge a rollout; return a reference to its TrainBatch, which stays in Ray's object store."""
        self._stop_here()
        with self._console.phase("generation", f"rollout {rollout_id}"), self._clock.inner() as seconds:
            this = self._begin_generation(rollout_id)
            metrics = self._report_of(this)
            seconds["generation"] = metrics.pop("time/generation", 0.0)
            seconds["reward"] = metrics.pop("time/reward", 0.0)
        self._record |= metrics | self._measure("generation")
        return this.batch

    def generate_ahead(self, rollout_id: int) -> Any:
        """Wait for this rollout's batch, start generating the next rollout, and return the batch like `generate`."""
        this = self._ahead or self._begin_generation(rollout_id)
        assert this.rollout_id == rollout_id, "the loop takes one rollout after the other"
        metrics = self._wait_for(this)
        self._stop_here()
        self._ahead = self._begin_generation(rollout_id + 1) if rollout_id + 1 < self._last else None
        for inside in ("time/generation", "time/reward"):  # the step's clock holds the time that the loop waited
            metrics.pop(inside, None)
        waited = min(this.waited, metrics["time/rollout"])
        metrics |= {"time/rollout_waited": waited, "time/rollout_hidden": metrics["time/rollout"] - waited}
        self._record |= metrics | self._measure("generation")
        return this.batch

    def _begin_generation(self, rollout_id: int) -> Generation:
        batch, report = self._processes.manager.generate.options(num_returns=2).remote(rollout_id)
        self._waiter.watch(f"rollout {rollout_id}: generation", report)
        return Generation(rollout_id, batch, report)

    def _wait_for(self, generation: Generation) -> dict[str, float]:
        """Return the metrics of the rollout once it is whole."""
        start = time.perf_counter()
        with self._phase("generation", f"rollout {generation.rollout_id}"):
            metrics = self._report_of(generation)
        generation.waited += time.perf_counter() - start
        return metrics

    def _report_of(self, generation: Generation) -> dict[str, float]:
        """Wait for the rollout's metrics. A signal aborts it, unless that would break --deterministic (see `stop`)."""
        phase, look_after = f"rollout {generation.rollout_id}: generation", self._weight_sync.look_after
        may_abort = not (self._args.deterministic and self._ahead is generation)
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
        if self._unsaved is not None:
            self._settle_ahead()
            self._memory.to_trainers()
            self._save(self._unsaved, export=False)
        self._stop.let_go(None)

    def _settle_ahead(self) -> None:
        """Prepare the rollout ahead for a save: wait until it is whole with --deterministic, and let a signal abort it.

        After a resume, the other half of a rollout would come from newer weights.
        """
        if self._ahead is not None and self._args.deterministic:
            self._wait_for(self._ahead)
        elif self._ahead is not None and self._stop.asked is not None:
            self._abort(self._ahead)

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Move the memory of colocated engines to the trainers; the next weight sync takes it back."""
        with self._phase("offload", "engines and trainers"):
            self._memory.to_trainers()
        yield

    def train(self, rollout_id: int, batch: Any) -> None:
        """Take one rollout's optimizer steps on all ranks."""
        trainers = self._processes.trainers
        if self._saves:
            self._stop.hold()
        with self._console.phase("training", f"rollout {rollout_id}"), self._clock.inner() as seconds:
            results = self._waiter.get(
                f"rollout {rollout_id}: training", [trainer.train.remote(rollout_id, batch) for trainer in trainers]
            )
            if results:
                seconds["training"] = results[0].pop("time/training")
                self._record |= results[0] | self._measure("training")
        self._unsaved = Trained(rollout_id, self._policy_version) if self._saves else None
        self._weight_sync.trained()
        self._metrics.write(rollout_id + 1, self._record)
        gap = self._record.get("train/logprob_gap_mean", 0.0)
        alarm = self._args.logprob_gap_alarm
        if alarm is not None and gap > alarm:
            self._console.say(
                f"WARNING rollout {rollout_id}: mean |train - rollout log-prob| is {gap:.3g}, above "
                f"--logprob-gap-alarm {alarm:g}: engine and trainer disagree about the policy"
            )

    def save_if_due(self, rollout_id: int) -> None:
        """Save a checkpoint when the schedule says so, after the last rollout, and if a signal asks to stop."""
        due = self._schedule.due(rollout_id)
        if self._unsaved is None or not (due or self._stop.asked):
            return
        self._settle_ahead()
        self._save(self._unsaved, export=due)

    def _save(self, trained: Trained, *, export: bool) -> None:
        """Save the state after `trained`; its policy version is the one before the weights are sent."""
        begin = time.perf_counter()
        rollout_id, trainers = trained.rollout_id, self._processes.trainers
        times = trained.times or self._clock.close()  # a resumed run knows only this part of the step's times
        with self._phase("checkpoint", f"rollout {rollout_id}"):
            [rollout] = self._waiter.get(
                "saving the data side", [self._processes.manager.state_dict.remote(rollout_id + 1)]
            )
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
            paths = self._waiter.get(f"rollout {rollout_id}: saving", saving)
        self.saved = paths[0]
        self._schedule.saved(time.perf_counter() - begin)
        self._console.say(f"saved {paths[0]}")
        self._unsaved = None
        if self._best is not None:
            self._best.saved(Path(paths[0]), step=rollout_id + 1)
        self._stop.let_go(paths[0])

    def sync_weights(self) -> None:
        """Send the actor's weights to every engine, as the next policy version.

        With --update-weight-pause drain, a rollout in flight is generated to its end first.
        """
        processes = self._processes
        self._policy_version += 1
        if not self._args.num_engines or not processes.trainers:
            return
        if self._ahead is not None and self._args.update_weight_pause == "drain":
            self._wait_for(self._ahead)
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
        with self._phase("offload", where):
            self._memory.to_weights()
            self._take_peaks()  # start measuring here: what a trainer has given back was never there with an engine's
        with self._phase("weight_sync", where):
            report = self._weight_sync.send(self._policy_version)
        self._sync_report = report | self._measure("weight_sync")
        with self._phase("offload", where):
            self._memory.to_engines()
            self._take_peaks()

    def _measure(self, phase: str) -> dict[str, float]:
        """Return the peak memory in `phase`, which ends now."""
        return memory_record(phase, self._take_peaks())

    def _take_peaks(self) -> list[dict[str, float]]:
        """Return every trainer's peak memory since the last call."""
        return self._waiter.get(
            "measuring memory", [trainer.peak_memory.remote() for trainer in self._processes.trainers]
        )

    def evaluate_before_first(self) -> None:
        """Evaluate before the first rollout; after a resume, run the evaluation that was due at the checkpoint."""
        interval = self._args.eval_interval
        if self._first == 0:
            due = not self._args.skip_eval_before_train
        else:
            due = interval is not None and self._first % interval == 0
        if due or self._first >= self._last:
            self._evaluate(self._first)

    def evaluate_if_due(self, rollout_id: int) -> None:
        """Evaluate every --eval-interval rollouts, and after the last."""
        interval = self._args.eval_interval
        if rollout_id == self._last - 1 or (interval is not None and (rollout_id + 1) % interval == 0):
            self._evaluate(rollout_id + 1)

    def _evaluate(self, step: int) -> None:
        args = self._args
        if not (args.eval_prompt_data or args.eval_config) or not (args.num_engines or args.validates):
            return
        self._stop_here()
        with self._phase("evaluation", f"evaluation after {count(step, 'rollout')}"):
            metrics = self._validate(step) if args.validates else self._generate_and_judge(step)
        metrics |= self._measure("evaluation")
        self._metrics.write(step, metrics)
        self._console.evaluation(step, metrics)
        if self._best is not None:
            self._best.evaluated(metrics, step=step)

    def _generate_and_judge(self, step: int) -> dict[str, float]:
        """Return the metrics of responses that the engines generate to the evaluation prompts."""
        waiting = f"evaluation after {step} rollouts", [self._processes.manager.evaluate.remote(step)]
        try:
            return self._waiter.get(*waiting, meanwhile=self._weight_sync.look_after, give_up=True)[0]
        except StopNoticed:
            self._waiter.get("aborting the evaluation", [self._processes.manager.abort_evaluation.remote()])
            self._stop_here()
            raise

    def _validate(self, step: int) -> dict[str, float]:
        """Return the losses on SFT's evaluation sets, whose rows stay in Ray's object store."""
        processes = self._processes
        if self._validation_sets is None:
            self._validation_sets = processes.manager.validation_sets.remote()
            self._waiter.get("loading the evaluation sets", [self._validation_sets])
        computing = [trainer.validate.remote(self._validation_sets) for trainer in processes.trainers]
        return self._waiter.get(f"evaluation after {step} rollouts", computing)[0]


Story = Callable[[Cluster], None]
"""A training loop, written in the verbs of a cluster."""
