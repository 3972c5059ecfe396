"""Evaluations: when one is due, and how its metrics are made, by the engines or as losses of the trainers.

- Used by: `Cluster.evaluate_before_first` and `Cluster.evaluate_if_due`.
- Invariant: a run evaluates before its first rollout, every --eval-interval and after its last, also across resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slime.cluster.actors import Processes
from slime.cluster.life.stop import StopNoticed
from slime.config.args import Args


class EvaluationSchedule:
    """Decides after which rollouts a run evaluates; `rollouts` are those that are left."""

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


class Evaluations:
    """Runs a run's evaluations. `look_after` is called while the engines generate (`meanwhile` of `Waiter.get`)."""

    def __init__(self, args: Args, processes: Processes, *, look_after: Callable[[], int]) -> None:
        self._validates = args.validates
        self._processes = processes
        self._look_after = look_after
        self._sets: Any = None
        """A reference to the rows of SFT's evaluation sets, once they are loaded."""

    def run(self, step: int) -> dict[str, float]:
        """Return the metrics of an evaluation after `step` rollouts.

        Raises:
            StopNoticed: a signal asked the run to stop; the generation is aborted.
        """
        return self._losses(step) if self._validates else self._judged(step)

    def _judged(self, step: int) -> dict[str, float]:
        """Return the metrics of responses that the engines generate to the evaluation prompts."""
        waiter, manager = self._processes.waiter, self._processes.manager
        phase, evaluating = f"evaluation after {step} rollouts", [manager.evaluate.remote(step)]
        try:
            return waiter.get(phase, evaluating, meanwhile=self._look_after, give_up=True)[0]
        except StopNoticed:
            waiter.get("aborting the evaluation", [manager.abort_evaluation.remote()])
            raise

    def _losses(self, step: int) -> dict[str, float]:
        """Return the losses on SFT's evaluation sets, whose rows stay in Ray's object store."""
        waiter = self._processes.waiter
        if self._sets is None:
            self._sets = self._processes.manager.validation_sets.remote()
            waiter.get("loading the evaluation sets", [self._sets])
        computing = [trainer.validate.remote(self._sets) for trainer in self._processes.trainers]
        return waiter.get(f"evaluation after {step} rollouts", computing)[0]
