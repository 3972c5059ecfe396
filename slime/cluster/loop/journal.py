"""Journal: what the steps of the training loop took and measured, for the metrics file and the console.

- Used by: `Cluster`, whose verbs open phases here and add their metrics.
- Invariant: a step's times, including `idle`, sum to its wall time, and every metric of a step is written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from slime.observability.console.run_console import RunConsole
from slime.observability.metrics_log import MetricsLog
from slime.observability.phases import StepClock, memory_record


class Journal:
    """The record of the present step: its seconds by phase, its metrics, and the trainers' peak memory."""

    def __init__(
        self,
        metrics: MetricsLog,
        console: RunConsole,
        *,
        take_peaks: Callable[[], list[dict[str, float]]],
        gap_alarm: float | None,
    ) -> None:
        """Begin a journal.

        Args:
            metrics: the run's metrics file.
            console: shows phases, steps and warnings.
            take_peaks: returns every trainer's peak memory since its last call, in GB by name.
            gap_alarm: the mean |train - rollout log-prob| above which a step gets a warning; None: never.
        """
        self._take_peaks = take_peaks
        self._metrics = metrics
        self._console = console
        self._gap_alarm = gap_alarm
        self._clock = StepClock()
        self._record: dict[str, float] = {}
        self._sync_report: dict[str, float] = {}
        self.times: Counter[str] = Counter()
        """Seconds of the run by phase, `time/...`, until the last `close`."""

    def begin(self, rollout_id: int) -> None:
        """Begin the step of a rollout. The time since the last step counts for the run, but for no step."""
        self.close()
        self._record = {}
        self._console.begin_rollout(rollout_id)

    def close(self) -> dict[str, float]:
        """Begin another step of the clock, and return the times of the one that ends."""
        times = self.times_so_far()
        self.times.update({name: seconds for name, seconds in times.items() if name != "time/step"})
        self._clock = StepClock()
        return times

    def times_so_far(self) -> dict[str, float]:
        """Return the present step's `time/...` until now."""
        return self._clock.close()

    def end(self, rollout_id: int, times: Mapping[str, float]) -> None:
        """Write and show the step of a rollout, whose `times` are closed."""
        self._metrics.write(rollout_id + 1, {**times, **self._sync_report})
        self._console.rollout(rollout_id, {**self._record, **self._sync_report, **times})

    @contextmanager
    def phase(self, name: str, where: str) -> Generator[None]:
        """Count what is inside the block as a phase, and show it."""
        with self._console.phase(name, where), self._clock.phase(name):
            yield

    @contextmanager
    def measured_elsewhere(self, name: str, where: str) -> Generator[dict[str, float]]:
        """Show a phase, whose seconds the block fills into the yielded dict, by phase (see `StepClock.inner`)."""
        with self._console.phase(name, where), self._clock.inner() as seconds:
            yield seconds

    def add(self, phase: str, metrics: Mapping[str, float]) -> None:
        """Add the metrics and the peak memory of a phase that ends now."""
        self._record = {**self._record, **metrics, **self._memory(phase)}

    def trained(self, rollout_id: int) -> None:
        """Write the metrics of a rollout that was trained on, and warn if engine and trainer disagree about it."""
        self._metrics.write(rollout_id + 1, self._record)
        gap = self._record.get("train/logprob_gap_mean", 0.0)
        if self._gap_alarm is not None and gap > self._gap_alarm:
            self._console.say(
                f"WARNING rollout {rollout_id}: mean |train - rollout log-prob| is {gap:.3g}, above "
                f"--logprob-gap-alarm {self._gap_alarm:g}: engine and trainer disagree about the policy"
            )

    def synced(self, report: Mapping[str, float]) -> None:
        """Keep the report of a weight sync that ends now; it belongs to every step until the next sync."""
        self._sync_report = {**report, **self._memory("weight_sync")}

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write, show and return the metrics and the peak memory of an evaluation that ends now."""
        metrics = {**metrics, **self._memory("evaluation")}
        self._metrics.write(step, metrics)
        self._console.evaluation(step, metrics)
        return metrics

    def _memory(self, phase: str) -> dict[str, float]:
        """Return the peak memory in `phase`, which ends now."""
        return memory_record(phase, self._take_peaks())
