"""Evaluations: when one is due, and how its metrics are made, by the engines or as losses of the trainers.

- Used by: `Cluster` begins an evaluation in `evaluate_before_first` and `evaluate_if_due`, and waits for it when the
  next rollout is whole, which the engines generate with the same weights at the same time. So both take as long as the
  longer one.
- Invariant: a run evaluates before its first rollout, every --eval-interval and after its last, also across resumes. No
  weights are sent and nothing is saved while an evaluation runs: its answers come from one policy, and a run that is
  killed meanwhile resumes from a checkpoint before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slime.cluster.actors import Processes
from slime.config.args import Args
from slime.observability.console.lines import count


class EvaluationSchedule:
    """Decides after which of the remaining `rollouts` a run evaluates."""

    def __init__(self, args: Args, rollouts: range) -> None:
        self._interval = args.eval_interval
        self._skips_first = args.skip_eval_before_train
        self._first, self._last = rollouts.start, rollouts.stop
        has_data = bool(args.eval_prompt_data or args.eval_config)
        self._possible = has_data and bool(args.num_engines or args.validates)

    def due_before_first(self) -> bool:
        """Return whether to evaluate before the first rollout; after a resume, whether the checkpoint's was due."""
        due = not self._skips_first if self._first == 0 else self._by_interval(self._first)
        return self._possible and (due or self._first >= self._last)

    def due(self, rollout_id: int) -> bool:
        """Return whether to evaluate after this rollout."""
        return self._possible and (rollout_id == self._last - 1 or self._by_interval(rollout_id + 1))

    def _by_interval(self, done: int) -> bool:
        return self._interval is not None and done % self._interval == 0


@dataclass(frozen=True)
class Evaluation:
    """An evaluation after `step` rollouts; the first of the references `results` will hold its metrics."""

    step: int
    results: list[Any]

    @property
    def phase(self) -> str:
        return f"evaluation after {count(self.step, 'rollout')}"


class Evaluations:
    """Runs a run's evaluations, one at a time. `look_after` is called while the engines generate (see `Waiter.get`)."""

    def __init__(self, args: Args, processes: Processes, *, look_after: Callable[[], int]) -> None:
        self._validates = args.validates
        self._processes = processes
        self._look_after = look_after
        self.running: Evaluation | None = None
        """The present evaluation."""
        self._sets: list[Any] = []
        """References to each data-parallel rank's rows of SFT's evaluation sets, once they are loaded."""

    def begin(self, step: int) -> bool:
        """Begin an evaluation after `step` rollouts, and return whether a rollout may be generated at the same time."""
        assert self.running is None, "one evaluation after the other"
        results = self._losses() if self._validates else [self._processes.manager.evaluate.remote(step)]
        self.running = Evaluation(step, results)
        if not self._validates:
            self._processes.waiter.watch(self.running.phase, results[0])
        return not self._validates

    def wait(self, *, give_up: bool) -> dict[str, float]:
        """Return the metrics of the present evaluation.

        Raises:
            StopNoticed: a signal asked the run to stop, and `give_up` allows to abort the evaluation for it.
        """
        assert self.running is not None, "nothing to wait for"
        phase, results, waiter = self.running.phase, self.running.results, self._processes.waiter
        if self._validates:
            metrics = waiter.get(phase, results)[0]
        else:
            metrics = waiter.get(phase, results, meanwhile=self._look_after, give_up=give_up)[0]
        self.running = None
        return metrics

    def abort(self) -> None:
        """Abort the present evaluation, if there is one."""
        if self.running is not None:
            self._processes.waiter.unwatch(self.running.results[0])
            self._processes.waiter.get("aborting the evaluation", [self._processes.manager.abort_evaluation.remote()])
            self.running = None

    def _losses(self) -> list[Any]:
        """Return references to the losses on SFT's evaluation sets, whose rows stay in Ray's object store."""
        processes = self._processes
        if not self._sets:
            self._sets, names = processes.validation_sets()
            processes.waiter.get("loading the evaluation sets", [names])
        each = zip(processes.trainers, processes.of_trainers(self._sets), strict=True)
        return [trainer.validate.remote(part) for trainer, part in each]
