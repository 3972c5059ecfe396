"""The console's lines about an evaluation."""

from __future__ import annotations

import pytest

from slime.observability.console import RunConsole
from slime.observability.phases import StepClock


def _lines(capsys: pytest.CaptureFixture[str], record: dict[str, float]) -> list[str]:
    console = RunConsole(total=10, done=0)
    console.evaluation(4, record)
    console.rollout(5, StepClock().close())
    console.close()
    return capsys.readouterr().out.splitlines()


def test_an_evaluation_shows_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"eval/a/reward": 0.25, "eval/a/reward_stderr": 0.1, "eval/a/failed": 0.0, "eval/a/reward_judged": 0.25}
    line = _lines(capsys, record)[0]
    assert line == "eval a after 4 rollouts: reward 0.250 ± 0.100  failed 0"
    line = _lines(capsys, record | {"eval/a/failed": 0.5, "eval/a/reward_judged": 0.5})[0]
    assert line == "eval a after 4 rollouts: reward 0.250 ± 0.100  failed 0.5  reward_judged 0.5"


def test_an_evaluation_without_reward_is_an_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    both = {"eval/a/failed": 1.0, "eval/a/num_prompts": 3.0, "eval/b/reward": 1.0}
    lines = _lines(capsys, both)
    assert (
        lines[0]
        == "ERROR eval a after 4 rollouts has no reward: all responses failed; logs/rollout.log has the reasons"
    )
    assert lines[1] == "eval b after 4 rollouts: reward 1.000"


def test_a_custom_evaluation_needs_no_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert _lines(capsys, {"eval/a/accuracy": 0.5})[0] == "eval a after 4 rollouts:  accuracy 0.5"
