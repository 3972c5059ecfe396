"""Cluster: the verbs of the training loop.

Path: `train.py` tells the story in these verbs; each becomes calls to the actors in `Processes`, and measures itself
into the step's clock. Invariant: a checkpoint and the metrics file agree: what was written behind the checkpoint is
written again by a resumed run.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from slime.cluster.mending import Mending
from slime.cluster.processes import Processes
from slime.cluster.trackers import start_trackers
from slime.cluster.turns import memory_of
from slime.config.args import Args
from slime.config.dump import dump_args
from slime.config.secrets import masker_of
from slime.observability.best_checkpoint import BestCheckpoint
from slime.observability.console import RunConsole
from slime.observability.logs import log_to_file
from slime.observability.phases import StepClock, memory_record
from slime.observability.run_directory import RunDirectory


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


@dataclass
class _Generation:
    """A rollout whose generation has begun. `batch` and `report` come from the rollout manager."""

    rollout_id: int
    batch: Any
    report: Any
    waited: float = 0.0
    """Seconds in which the loop has done nothing but wait for it."""


def _run_directory(args: Args) -> RunDirectory:
    """Locked, with every other place that the run writes to; no other run may."""
    assert args.log_dir is not None, "resolving the arguments sets it"
    directories = [args.save_debug_train_data, args.save if args.num_rollout != 0 else None]
    outputs = [args.save_hf, args.save_debug_rollout_data]
    return RunDirectory(
        Path(args.log_dir),
        [Path(path) for path in directories if path is not None],
        [Path(path) for path in outputs if path is not None],
    )


class Cluster:
    """Use as `with Cluster(args) as cluster`: leaving the block ends every process that entering it started."""

    def __init__(self, args: Args, *, restarts: int = 0) -> None:
        """`restarts`: how often faults have ended this run before."""
        self._args = args
        self._restarts = restarts
        self._cleanup = ExitStack()
        self._policy_version = 0
        self._first = self._last = 0
        self._clock = StepClock()
        self._record: dict[str, float] = {}
        self._sync_report: dict[str, float] = {}
        self._ahead: _Generation | None = None
        self._best: BestCheckpoint | None = None
        self._ended_well = False

    def __enter__(self) -> Cluster:
        with self._cleanup:
            self._start()
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended_well = error is None
        self._cleanup.close()

    def _start(self) -> None:
        args = self._args
        signal.signal(signal.SIGTERM, _exit_on_sigterm)
        directory = _run_directory(args)
        self._cleanup.callback(directory.close)
        log_to_file(directory.logs, "driver", masker_of(args))
        self._processes = processes = Processes(args, directory.logs)
        self._cleanup.callback(lambda: processes.stop(well=self._ended_well))
        processes.start()
        signal.signal(signal.SIGTERM, _exit_on_sigterm)  # Ray has put its own in the place of ours
        self._memory = memory_of(args, processes)
        loaded, warnings = self._memory.load()
        state = None
        if loaded is not None:
            self._first, state = loaded.next_rollout_id, loaded.state
        if state is not None:
            self._policy_version = state["policy_version"]
            processes.get("restoring the data side", [processes.manager.load_state_dict.remote(state["rollout"])])
        self._last = processes.num_rollouts
        # From here on the run is accepted: what it says of itself goes into its directory.
        directory.write_args(dump_args(args))
        in_place = loaded is not None and args.save is not None and Path(args.save) in Path(loaded.source).parents
        continued = state is not None and in_place
        self._console = RunConsole(total=self._last, done=self._first)
        self._cleanup.callback(self._console.close)
        # without rollouts nothing that stands behind the checkpoint is written again
        seen = self._first if self._last else None
        self._metrics, damage = directory.continue_metrics(seen) if continued else (directory.new_metrics(), None)
        warnings = [*warnings, damage] if damage is not None else warnings
        self._cleanup.callback(self._metrics.close)
        trackers = start_trackers(args, directory.run_id(new=not continued), self._first)
        self._metrics.track(trackers, self._console.say)
        if state is not None and self._last:
            self._metrics.write(self._first, state["times"])
        if args.keep_best_checkpoint is not None and args.save is not None and self._last:
            self._best = BestCheckpoint(Path(args.save), args.keep_best_checkpoint, say=self._console.say)
            if loaded is not None and continued:
                self._best.saved(Path(loaded.source), step=self._first)
        if self._restarts:
            self._metrics.write(self._first, {"fault/run_restarts": self._restarts})
        for warning in warnings:
            self._console.say(f"WARNING {warning}")
        if loaded is not None:
            self._console.say(f"actor loaded from {loaded.source}, starting at rollout {self._first}")
        if 0 < self._last <= self._first:
            self._console.say(f"nothing left to train: {self._first} of {self._last} rollouts are done")
        self._mending = Mending(processes, self._memory, self._console.say)
        self._memory.connect()
        processes.started()

    def rollouts(self) -> Iterator[int]:
        """The ids of the rollouts still to do; each iteration is one step of the clock."""
        for rollout_id in range(self._first, self._last):
            self._clock, self._record = StepClock(), {}
            yield rollout_id
            times = self._clock.close()
            self._metrics.write(rollout_id + 1, {**times, **self._sync_report})
            self._console.rollout(rollout_id + 1, {**self._record, **self._sync_report, **times})

    def generate(self, rollout_id: int) -> Any:
        """Generate, judge and collect; returns a reference to the TrainBatch, which stays in Ray's object store."""
        with self._clock.inner() as seconds:
            this = self._begin_generation(rollout_id)
            metrics = self._report_of(this)
            seconds["generation"] = metrics.pop("time/generation", 0.0)
            seconds["reward"] = metrics.pop("time/reward", 0.0)
        self._record |= metrics | self._measure("generation")
        return this.batch

    def generate_ahead(self, rollout_id: int) -> Any:
        """Wait for this rollout's batch, as `generate` returns it, and let the next one's generation begin."""
        this = self._ahead or self._begin_generation(rollout_id)
        assert this.rollout_id == rollout_id, "the loop takes one rollout after the other"
        metrics = self._wait_for(this)
        self._ahead = self._begin_generation(rollout_id + 1) if rollout_id + 1 < self._last else None
        for inside in ("time/generation", "time/reward"):  # the step's clock has what the loop waited
            metrics.pop(inside, None)
        waited = min(this.waited, metrics["time/rollout"])
        metrics |= {"time/rollout_waited": waited, "time/rollout_hidden": metrics["time/rollout"] - waited}
        self._record |= metrics | self._measure("generation")
        return this.batch

    def _begin_generation(self, rollout_id: int) -> _Generation:
        batch, report = self._processes.manager.generate.options(num_returns=2).remote(rollout_id)
        self._processes.watch(f"rollout {rollout_id}: generation", report)
        return _Generation(rollout_id, batch, report)

    def _wait_for(self, generation: _Generation) -> dict[str, float]:
        """Its metrics, once it is whole."""
        start = time.perf_counter()
        with self._clock.phase("generation"):
            metrics = self._report_of(generation)
        generation.waited += time.perf_counter() - start
        return metrics

    def _report_of(self, generation: _Generation) -> dict[str, float]:
        phase = f"rollout {generation.rollout_id}: generation"
        return self._processes.get(phase, [generation.report], meanwhile=self._mending.look_after)[0]

    @contextmanager
    def engines_asleep(self) -> Iterator[None]:
        """Engines that share devices with trainers give their memory to them; the next weight sync takes it back."""
        with self._clock.phase("offload"):
            self._memory.to_trainers()
        yield

    def train(self, rollout_id: int, batch: Any) -> None:
        """One rollout's optimizer steps, on all ranks."""
        trainers = self._processes.trainers
        with self._clock.inner() as seconds:
            results = self._processes.get(
                f"rollout {rollout_id}: training", [trainer.train.remote(rollout_id, batch) for trainer in trainers]
            )
            if results:
                seconds["training"] = results[0].pop("time/training")
                self._record |= results[0] | self._measure("training")
        self._mending.trained()
        self._metrics.write(rollout_id + 1, self._record)
        gap = self._record.get("train/logprob_gap_mean", 0.0)
        alarm = self._args.logprob_gap_alarm
        if alarm is not None and gap > alarm:
            self._console.say(
                f"WARNING rollout {rollout_id}: mean |train - rollout log-prob| is {gap:.3g}, above "
                f"--logprob-gap-alarm {alarm:g}: engine and trainer disagree about the policy"
            )

    def save_if_due(self, rollout_id: int) -> None:
        """Every --save-interval rollouts, and after the last."""
        args, trainers = self._args, self._processes.trainers
        last = rollout_id == self._last - 1
        due = args.save_interval is not None and (rollout_id + 1) % args.save_interval == 0
        if args.save is None or not trainers or not (due or last):
            return
        if args.deterministic and self._ahead is not None:
            self._wait_for(self._ahead)  # a resumed run takes it whole: half of one would be generated by other weights
        times = self._clock.close()  # a resumed run knows of this step what had passed until here
        with self._clock.phase("checkpoint"):
            [rollout] = self._processes.get(
                "saving the data side", [self._processes.manager.state_dict.remote(rollout_id + 1)]
            )
            state = {
                "rollout": rollout,
                "policy_version": self._policy_version,
                "times": times,
            }
            # rank 0 writes it: with whole rollouts in it, it is too large to be sent to all for nothing
            saving = [t.save.remote(rollout_id, state if rank == 0 else {}) for rank, t in enumerate(trainers)]
            paths = self._processes.get(f"rollout {rollout_id}: saving", saving)
        self._console.say(f"saved {paths[0]}")
        if self._best is not None:
            self._best.saved(Path(paths[0]), step=rollout_id + 1)

    def sync_weights(self) -> None:
        """The actor's weights go to every engine, as the next policy version.

        With --update-weight-pause drain a rollout in flight is generated whole first.
        """
        processes = self._processes
        self._policy_version += 1
        if not self._args.num_engines or not processes.trainers:
            return
        if self._ahead is not None and self._args.update_weight_pause == "drain":
            self._wait_for(self._ahead)
        with self._clock.phase("offload"):
            self._memory.to_weights()
            self._take_peaks()  # what a trainer has just given back was never there together with an engine's
        with self._clock.phase("weight_sync"):
            report = self._mending.send(self._policy_version)
        self._sync_report = report | self._measure("weight_sync")
        with self._clock.phase("offload"):
            self._memory.to_engines()
            self._take_peaks()

    def _measure(self, phase: str) -> dict[str, float]:
        """The most memory in `phase`, which ends now."""
        return memory_record(phase, self._take_peaks())

    def _take_peaks(self) -> list[dict[str, float]]:
        """Every trainer's since the last call."""
        return self._processes.get(
            "measuring memory", [trainer.peak_memory.remote() for trainer in self._processes.trainers]
        )

    def evaluate_before_first(self) -> None:
        """Before the first rollout; after a resume, the evaluation that was due at the checkpoint."""
        interval = self._args.eval_interval
        if self._first == 0:
            due = not self._args.skip_eval_before_train
        else:
            due = interval is not None and self._first % interval == 0
        if due or self._first >= self._last:
            self._evaluate(self._first)

    def evaluate_if_due(self, rollout_id: int) -> None:
        """Every --eval-interval rollouts, and after the last."""
        interval = self._args.eval_interval
        if rollout_id == self._last - 1 or (interval is not None and (rollout_id + 1) % interval == 0):
            self._evaluate(rollout_id + 1)

    def _evaluate(self, step: int) -> None:
        args = self._args
        if not (args.eval_prompt_data or args.eval_config) or not args.num_engines:
            return
        with self._clock.phase("evaluation"):
            [metrics] = self._processes.get(
                f"evaluation after {step} rollouts",
                [self._processes.manager.evaluate.remote(step)],
                meanwhile=self._mending.look_after,
            )
        metrics |= self._measure("evaluation")
        self._metrics.write(step, metrics)
        self._console.evaluation(step, metrics)
        if self._best is not None:
            self._best.evaluated(metrics, step=step)
