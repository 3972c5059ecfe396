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

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from slime.cluster.actors import Processes, running_processes
from slime.cluster.colocation import DedicatedDevices, make_memory_schedule
from slime.cluster.start_trackers import start_trackers
from slime.cluster.weight_sync import EngineWeightSync
from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.secrets import masker_of
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console import RunConsole
from slime.observability.logs import log_to_file
from slime.observability.metrics_log import MetricsLog
from slime.observability.phases import StepClock, memory_record
from slime.observability.run_directory import RunDirectory


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


@dataclass
class _Generation:
    """A rollout whose generation has begun. `batch` and `report` are references that the rollout manager fills."""

    rollout_id: int
    batch: Any
    report: Any
    waited: float = 0.0
    """Seconds in which the loop did nothing but wait for this rollout."""


def _run_directory(args: Args) -> RunDirectory:
    """Return the run's directory, locked together with every other place that the run writes to."""
    directories = [args.save_debug_train_data, args.save if args.num_rollout != 0 else None]
    outputs = [args.save_hf, args.save_debug_rollout_data]
    return RunDirectory(
        Path(args.resolved.log_dir),
        [Path(path) for path in directories if path is not None],
        [Path(path) for path in outputs if path is not None],
    )


class Cluster:
    """The verbs of the training loop, on a cluster that runs (see `running_cluster`)."""

    def __init__(
        self,
        args: Args,
        *,
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
        self._processes = processes
        self._waiter = processes.waiter
        self._memory = memory
        self._metrics = metrics
        self._console = console
        self._best = best
        self._first, self._last = rollouts.start, rollouts.stop
        self._policy_version = policy_version
        self._weight_sync = EngineWeightSync(processes, memory, console.say)
        self._clock = StepClock()
        self._record: dict[str, float] = {}
        self._sync_report: dict[str, float] = {}
        self._ahead: _Generation | None = None
        self._validation_sets: Any = None
        """A reference to the rows of SFT's evaluation sets, once they are loaded."""

    def rollouts(self) -> Iterator[int]:
        """Yield the ids of the rollouts that are left; each iteration is one step of the clock."""
        for rollout_id in range(self._first, self._last):
            self._clock, self._record = StepClock(), {}
            yield rollout_id
            times = self._clock.close()
            self._metrics.write(rollout_id + 1, {**times, **self._sync_report})
            self._console.rollout(rollout_id + 1, {**self._record, **self._sync_report, **times})

    def generate(self, rollout_id: int) -> Any:
        """Generate and judge a rollout; return a reference to its TrainBatch, which stays in Ray's object store."""
        with self._clock.inner() as seconds:
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
        self._ahead = self._begin_generation(rollout_id + 1) if rollout_id + 1 < self._last else None
        for inside in ("time/generation", "time/reward"):  # the step's clock holds the time that the loop waited
            metrics.pop(inside, None)
        waited = min(this.waited, metrics["time/rollout"])
        metrics |= {"time/rollout_waited": waited, "time/rollout_hidden": metrics["time/rollout"] - waited}
        self._record |= metrics | self._measure("generation")
        return this.batch

    def _begin_generation(self, rollout_id: int) -> _Generation:
        batch, report = self._processes.manager.generate.options(num_returns=2).remote(rollout_id)
        self._waiter.watch(f"rollout {rollout_id}: generation", report)
        return _Generation(rollout_id, batch, report)

    def _wait_for(self, generation: _Generation) -> dict[str, float]:
        """Return the metrics of the rollout once it is whole."""
        start = time.perf_counter()
        with self._clock.phase("generation"):
            metrics = self._report_of(generation)
        generation.waited += time.perf_counter() - start
        return metrics

    def _report_of(self, generation: _Generation) -> dict[str, float]:
        phase = f"rollout {generation.rollout_id}: generation"
        return self._waiter.get(phase, [generation.report], meanwhile=self._weight_sync.look_after)[0]

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Move the memory of colocated engines to the trainers; the next weight sync takes it back."""
        with self._clock.phase("offload"):
            self._memory.to_trainers()
        yield

    def train(self, rollout_id: int, batch: Any) -> None:
        """Take one rollout's optimizer steps on all ranks."""
        trainers = self._processes.trainers
        with self._clock.inner() as seconds:
            results = self._waiter.get(
                f"rollout {rollout_id}: training", [trainer.train.remote(rollout_id, batch) for trainer in trainers]
            )
            if results:
                seconds["training"] = results[0].pop("time/training")
                self._record |= results[0] | self._measure("training")
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
        """Save a checkpoint every --save-interval rollouts, and after the last."""
        args, trainers = self._args, self._processes.trainers
        last = rollout_id == self._last - 1
        due = args.save_interval is not None and (rollout_id + 1) % args.save_interval == 0
        if args.save is None or not trainers or not (due or last):
            return
        if args.deterministic and self._ahead is not None:
            self._wait_for(self._ahead)  # after a resume, the other half of a rollout would come from newer weights
        times = self._clock.close()  # a resumed run knows only this part of the step's times
        with self._clock.phase("checkpoint"):
            [rollout] = self._waiter.get(
                "saving the data side", [self._processes.manager.state_dict.remote(rollout_id + 1)]
            )
            state = {
                "rollout": rollout,
                "policy_version": self._policy_version,
                "times": times,
            }
            # Rank 0 alone writes the state. It may hold whole rollouts, too large to send to ranks that ignore it.
            saving = [t.save.remote(rollout_id, state if rank == 0 else {}) for rank, t in enumerate(trainers)]
            paths = self._waiter.get(f"rollout {rollout_id}: saving", saving)
        self._console.say(f"saved {paths[0]}")
        if self._best is not None:
            self._best.saved(Path(paths[0]), step=rollout_id + 1)

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
        with self._clock.phase("offload"):
            self._memory.to_weights()
            self._take_peaks()  # start measuring here: what a trainer has given back was never there with an engine's
        with self._clock.phase("weight_sync"):
            report = self._weight_sync.send(self._policy_version)
        self._sync_report = report | self._measure("weight_sync")
        with self._clock.phase("offload"):
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
        with self._clock.phase("evaluation"):
            metrics = self._validate(step) if args.validates else self._generate_and_judge(step)
        metrics |= self._measure("evaluation")
        self._metrics.write(step, metrics)
        self._console.evaluation(step, metrics)
        if self._best is not None:
            self._best.evaluated(metrics, step=step)

    def _generate_and_judge(self, step: int) -> dict[str, float]:
        """Return the metrics of responses that the engines generate to the evaluation prompts."""
        [metrics] = self._waiter.get(
            f"evaluation after {step} rollouts",
            [self._processes.manager.evaluate.remote(step)],
            meanwhile=self._weight_sync.look_after,
        )
        return metrics

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


@contextmanager
def running_cluster(args: Args, *, restarts: int = 0) -> Iterator[Cluster]:
    """Start a cluster for the block; leaving the block ends every process that it started.

    `restarts` is how often faults have ended this run before.

    Raises:
        RunError: naming what does not start.
    """
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    with ExitStack() as cleanup:
        directory = _run_directory(args)
        cleanup.callback(directory.close)
        log_to_file(directory.logs, "driver", masker_of(args))
        processes = cleanup.enter_context(running_processes(args, directory.logs))
        signal.signal(signal.SIGTERM, _exit_on_sigterm)  # Ray has replaced our handler with its own
        memory = make_memory_schedule(args, processes)
        loaded, warnings = memory.load()
        first, last, policy_version, state = 0, processes.num_rollouts, 0, None
        if loaded is not None:
            first, state = loaded.next_rollout_id, loaded.state
        if state is not None:
            policy_version = state["policy_version"]
            restoring = [processes.manager.load_state_dict.remote(state["rollout"])]
            processes.waiter.get("restoring the data side", restoring)
        # From here on the run is accepted, so what it reports goes into its directory.
        directory.write_args(dump_args(args))
        source = None if loaded is None else Path(loaded.source)
        in_place = source is not None and args.save is not None and Path(args.save) in source.parents
        continued = state is not None and in_place
        console = RunConsole(total=last, done=first)
        cleanup.callback(console.close)
        # A run without rollouts writes no metrics again, so it keeps all of them, also those after the checkpoint.
        seen = first if last else None
        metrics, damage = directory.continue_metrics(seen) if continued else (directory.new_metrics(), list[str]())
        cleanup.callback(metrics.close)
        metrics.track(start_trackers(args, directory.run_id(new=not continued), first), console.say)
        if state is not None and last:
            metrics.write(first, state["times"])
        best = None
        if args.keep_best_checkpoint is not None and args.save is not None and last:
            best = BestCheckpoint(Path(args.save), args.keep_best_checkpoint, say=console.say)
            if source is not None and continued:
                best.saved(source, step=first)
        if restarts:
            metrics.write(first, {"fault/run_restarts": restarts})
        for warning in [*warnings, *damage]:
            console.say(f"WARNING {warning}")
        if loaded is not None:
            console.say(f"actor loaded from {loaded.source}, starting at rollout {first}")
        if 0 < last <= first:
            console.say(f"nothing left to train: {first} of {last} rollouts are done")
        memory.connect()
        processes.started()
        yield Cluster(
            args,
            processes=processes,
            memory=memory,
            metrics=metrics,
            console=console,
            best=best,
            rollouts=range(first, last),
            policy_version=policy_version,
        )
