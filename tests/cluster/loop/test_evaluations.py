"""After which rollouts a run evaluates, also when it resumes."""

from __future__ import annotations

from slime.cluster.loop.evaluations import EvaluationSchedule
from slime.config.args import Args


def run(rollouts: range, **fields: object) -> list[int]:
    """Return after how many rollouts a run with these rollouts left evaluates."""
    args = Args(**{"eval_prompt_data": ["gsm", "a.jsonl"], "rollout_num_gpus": 1, **fields})  # pyright: ignore[reportArgumentType]
    schedule = EvaluationSchedule(args, rollouts)
    before = [rollouts.start] if schedule.due_before_first() else []
    return [*before, *[rollout + 1 for rollout in rollouts if schedule.due(rollout)]]


def test_evaluations_are_first_last_and_by_interval() -> None:
    assert run(range(5), eval_interval=2) == [0, 2, 4, 5]
    assert run(range(5)) == [0, 5]
    assert run(range(5), eval_interval=2, skip_eval_before_train=True) == [2, 4, 5]


def test_a_resumed_run_evaluates_as_the_whole_one() -> None:
    """The checkpoint is older than the evaluation after it, so a resumed run repeats one that was due there."""
    whole = run(range(7), eval_interval=3)
    for first in range(1, 7):
        assert run(range(first, 7), eval_interval=3) == [step for step in whole if step >= first]


def test_a_run_with_nothing_left_evaluates_once() -> None:
    assert run(range(5, 5), eval_interval=2) == [5]
    assert run(range(0), eval_interval=2, skip_eval_before_train=True) == [0]


def test_evaluations_need_data_and_engines() -> None:
    assert run(range(5), eval_prompt_data=None, eval_interval=1) == []
    assert run(range(5), rollout_num_gpus=0, eval_interval=1) == []
