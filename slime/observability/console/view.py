"""View: what the console knows about a run at one moment, with its estimates of the time left.

- Used by: `run_console` replaces its view with every event; `live` and the plain lines read it.
- Invariant: a view is never changed, so that the thread that draws always sees a whole one. Its estimates come from the
  run's own past: before the first rollout has ended there is none for the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from slime.observability.progress import SampleProgress, WorkProgress

REMEMBERED = 200
"""Values of each curve that are kept for sparklines."""
AVERAGED = 10
"""Rollouts whose times are averaged for estimates."""
ENOUGH = 0.1
"""Share of a phase that has to be done before its own speed is an estimate."""
VERBS = {
    "generation": "generating",
    "offload": "moving memory",
    "training": "training",
    "weight_sync": "syncing weights",
    "checkpoint": "saving",
    "evaluation": "evaluating",
}
ALWAYS = ("generation", "offload", "training", "weight_sync")
"""Phases that every rollout has; the others come now and then."""


@dataclass(frozen=True)
class Phase:
    """A phase in progress; `where` is the rollout or evaluation that it belongs to."""

    name: str
    where: str
    since: float

    @property
    def verb(self) -> str:
        return VERBS.get(self.name, self.name)


@dataclass(frozen=True)
class View:
    """One moment of a run. Times are those of `time.monotonic`."""

    total: int
    done: int
    stage: str | None = None
    """The stage of the start, until the first rollout."""
    note: str = ""
    """The work that the stage is busy with."""
    stage_since: float = 0.0
    rollout_id: int | None = None
    phase: Phase | None = None
    work: WorkProgress = field(default_factory=WorkProgress)
    step_since: float = 0.0
    this_step: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds of the phases of this rollout that have ended."""
    past: tuple[Mapping[str, float], ...] = ()
    """Seconds by phase of the last rollouts; `step` is the whole."""
    rewards: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    evaluations: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, "tuple[float, ...]"])
    last: Mapping[str, float] = field(default_factory=dict[str, float])
    """The metrics of the last rollout."""
    faults: int = 0

    # ---- events

    def with_phase(self, name: str | None, where: str, now: float) -> View:
        """Return the view in another phase; None: between phases."""
        spent = dict(self.this_step)
        if self.phase is not None:
            spent[self.phase.name] = spent.get(self.phase.name, 0.0) + now - self.phase.since
        phase = None if name is None else Phase(name, where, now)
        work = replace(self.work, evaluation=None)  # the last report may be that of an evaluation before this one
        return replace(self, phase=phase, this_step=spent, work=work)

    def with_rollout(self, rollout_id: int, now: float) -> View:
        """Return the view at the beginning of a rollout."""
        return replace(self, rollout_id=rollout_id, step_since=now, this_step={}, phase=None, stage=None)

    def with_rollout_done(self, record: Mapping[str, float], now: float) -> View:
        """Return the view after a rollout; `record` has its metrics."""
        ended = self.with_phase(None, "", now)
        times = {**ended.this_step, "step": now - self.step_since}
        reward, loss = record.get("rollout/reward"), record.get("train/loss")
        faults = sum(int(value) for key, value in record.items() if key.startswith("fault/"))
        return replace(
            ended,
            done=self.done + 1,
            past=(*self.past, times)[-AVERAGED - 1 :],
            last=record,
            faults=self.faults + faults,
            rewards=self.rewards if reward is None else (*self.rewards, reward)[-REMEMBERED:],
            losses=self.losses if loss is None else (*self.losses, loss)[-REMEMBERED:],
        )

    def with_evaluation(self, rewards: Mapping[str, float]) -> View:
        """Return the view after an evaluation; `rewards` by data set."""
        curves = dict(self.evaluations)
        for name, reward in rewards.items():
            curves[name] = (*curves.get(name, ()), reward)[-REMEMBERED:]
        return replace(self, evaluations=curves)

    # ---- what is shown

    @property
    def samples(self) -> SampleProgress | None:
        """The progress of the phase's samples, if it has any and the manager has reported them."""
        if self.phase is None:
            return None
        if self.phase.name == "evaluation":
            return self.work.evaluation
        ours = self.phase.name == "generation" and self.phase.where == f"rollout {self.work.rollout_id}"
        return self.work.rollout if ours else None

    @property
    def ahead(self) -> SampleProgress | None:
        """The progress of the next rollout, which is generated while the loop does something else."""
        is_next = self.work.rollout_id is not None and self.work.rollout_id != self.rollout_id
        return self.work.rollout if is_next and self.samples is None else None

    # ---- estimates

    def _averaged(self) -> tuple[Mapping[str, float], ...]:
        """The past rollouts; the first one of the run, which warms up, only if there is no other."""
        return self.past[1:] if len(self.past) > 1 else self.past

    def _expected(self, phase: str) -> float | None:
        past = [times[phase] for times in self._averaged() if phase in times]
        return statistics.fmean(past) if past else None

    def phase_left(self, now: float | None = None) -> float | None:
        """Return the seconds that the phase will still take; None if nothing is known about it."""
        if self.phase is None:
            return None
        elapsed = (time.monotonic() if now is None else now) - self.phase.since
        samples, expected = self.samples, self._expected(self.phase.name)
        by_past = None if expected is None or elapsed > expected else expected - elapsed
        if samples is None or samples.share < ENOUGH:
            return by_past
        by_speed = samples.seconds * (1 - samples.share) / samples.share
        # Responses that begin together end together, so early on the speed says less than the past.
        return by_speed if by_past is None else samples.share * by_speed + (1 - samples.share) * by_past

    def phase_share(self, now: float | None = None) -> float | None:
        """Return the share of the phase that is done: of its samples, or of the time that it usually takes."""
        if self.phase is None:
            return None
        if self.samples is not None:
            return self.samples.share
        expected = self._expected(self.phase.name)
        elapsed = (time.monotonic() if now is None else now) - self.phase.since
        return None if not expected else min(elapsed / expected, 0.99)

    def rollout_left(self, now: float | None = None) -> float | None:
        """Return the seconds until this rollout is trained on and the engines have its weights."""
        if self.phase is None or self.phase.name not in ALWAYS:
            return None
        left = self.phase_left(now)
        if left is None or not self.past:
            return None
        ended = {*self.this_step, self.phase.name}
        return left + sum(self._expected(name) or 0.0 for name in ALWAYS if name not in ended)

    def run_left(self, now: float | None = None) -> float | None:
        """Return the seconds until the last rollout has ended; None before the first one has."""
        past = self._averaged()
        if not past or self.done >= self.total:
            return None
        mean = statistics.fmean(times["step"] for times in past)
        elapsed = (time.monotonic() if now is None else now) - self.step_since
        return (self.total - self.done - 1) * mean + max(self.rollout_left(now) or 0.0, mean - elapsed)
