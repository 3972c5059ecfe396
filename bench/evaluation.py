"""A rollout with an evaluation at the same time, which should take as long as the longer of both.

    python -m bench.evaluation        (make bench-evaluation)

The collector, the evaluator, their client, router, protocol and scheduler are the real ones, in one process as in the
rollout manager; only an engine's forward pass is a timed sleep (`timed_engine`). Each turn measures the rollout alone,
the evaluation alone, and both at once, with new weights before each. Invariant: the evaluation's metrics are the same
alone and next to a rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bench.common import OUTPUTS, Goal, Spread, Table, in_turns, machine, write_result
from bench.rollout_schedule import Engines, Schedule, Shape
from bench.timed_engine import Timing
from slime.rollout.evaluate import Evaluator

GOAL = 1 / 1.1
CASES = {"the evaluation is shorter": (1.0, 0.4), "both take the same time": (1.0, 1.0), "it is longer": (0.4, 1.0)}
"""The longest responses of rollout and evaluation, as shares of the longest that engines make."""


class Both:
    """One case: a rollout and an evaluation that can run alone or at once, on the same engines."""

    def __init__(self, engines: Engines, rollout_share: float, evaluation_share: float, problems: int) -> None:
        self._engines = engines
        schedule = Schedule(engines, 1.0, False)
        self._cap = engines.timing.cap
        schedule.args = replace(
            schedule.args,
            rollout_max_response_len=round(rollout_share * self._cap),
            eval_prompt_data=("problems", f"{engines.prompts}@[0:{problems}]"),
            n_samples_per_eval_prompt=1,
            eval_input_key="prompt",
            eval_label_key="label",
            eval_rm_type="random",
            eval_temperature=1.0,
            eval_top_p=1.0,
            eval_max_response_len=round(evaluation_share * self._cap),
        )
        self._schedule = schedule
        self._evaluator = Evaluator(schedule.args, engines.tokenizer)
        self._number = 0
        self.metrics: list[dict[str, float]] = []

    def close(self) -> None:
        self._schedule.rewards.close()

    def rollout(self) -> float:
        return self._timed(with_rollout=True, with_evaluation=False)

    def evaluation(self) -> float:
        return self._timed(with_rollout=False, with_evaluation=True)

    def both(self) -> float:
        return self._timed(with_rollout=True, with_evaluation=True)

    def _timed(self, *, with_rollout: bool, with_evaluation: bool) -> float:
        return self._engines.loop.run_until_complete(self._run(with_rollout, with_evaluation))

    async def _run(self, with_rollout: bool, with_evaluation: bool) -> float:
        version = await self._engines.take_weights()
        context = self._schedule.context(version)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            if with_evaluation:
                evaluation = group.create_task(self._evaluator.run(0, context))
            if with_rollout:
                group.create_task(self._schedule.collect(context))
        seconds = time.perf_counter() - start
        if with_evaluation:
            metrics = evaluation.result()  # pyright: ignore[reportPossiblyUnboundVariable]
            self.metrics.append({name: value for name, value in metrics.items() if not name.endswith("time")})
        return seconds


def compare(engines: Engines, *, problems: int, rounds: int) -> tuple[Table, Goal, dict[str, dict[str, list[float]]]]:
    """Measure every case in turns.

    Raises:
        RuntimeError: an evaluation next to a rollout found something else than one alone.
    """
    shape = engines.shape
    table = Table(
        f"A rollout of {shape.batch} samples with an evaluation of {problems}",
        ["", "rollout alone, s", "evaluation alone, s", "both at once, s", "over the longer", "over their sum"],
        note=f"{shape.engines} engines of {shape.slots} slots, {engines.timing.step:g} s a decode step; medians.",
    )
    raw: dict[str, dict[str, list[float]]] = {}
    worst = 0.0
    for name, (rollout_share, evaluation_share) in CASES.items():
        both = Both(engines, rollout_share, evaluation_share, problems)
        try:
            sides = {"rollout": both.rollout, "evaluation": both.evaluation, "both": both.both}
            found = in_turns(sides, rounds=rounds)
        finally:
            both.close()
        if any(metrics != both.metrics[0] for metrics in both.metrics):
            raise RuntimeError(f"{name}: the metrics of evaluations differ: {both.metrics}")
        raw[name] = found
        medians = [Spread.of(found[side]).median for side in sides]
        longer, total = max(medians[:2]), sum(medians[:2])
        worst = max(worst, medians[2] / longer)
        row = [Spread.of(found[side]).show(2) for side in sides]
        table.rows.append([name, *row, f"{medians[2] / longer:.2f}", f"{medians[2] / total:.2f}"])
    return table, Goal("the longer of both / both at once, worst case", 1 / worst, round(GOAL, 2)), raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a rollout")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt")
    parser.add_argument("--problems", type=int, default=64, help="prompts of the evaluation")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--slots", type=int, default=96, help="requests that one engine runs at a time")
    parser.add_argument("--cap", type=int, default=320, help="the longest response")
    parser.add_argument("--step", type=float, default=0.01, help="seconds of a decode step")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUTPUTS / "evaluation.json")
    given = parser.parse_args()
    facts = machine()
    timing = Timing(median=given.cap / 3, sigma=1.0, cap=given.cap, step=given.step)
    shape = Shape(given.prompts, given.samples, given.engines, given.slots)
    with ExitStack() as stack:
        engines = Engines(timing, shape, layers=1, hidden=16, stack=stack)
        table, goal, raw = compare(engines, problems=given.problems, rounds=given.rounds)
    write_result(given.out, [table], [goal], facts, raw)


if __name__ == "__main__":
    main()
