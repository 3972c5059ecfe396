"""A custom reward is called once before a run: wrong forms are errors, exceptions are warnings with their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.config.args import Args
from slime.rollout.reward_trial import try_reward

REWARDS = """
import asyncio, time, os
def right(args, sample): return float(sample.label in sample.response and sample.row["unit"] == "cm")
def entries(args, sample): return {"score": 1.0, "style": 2.0}
def nan(args, sample): return float("nan")
def text(args, sample): return "good"
def unit(args, sample):
    print("looking")
    return sample.row["units"]
def crash(args, sample): os._exit(3)
async def slow(args, sample): await asyncio.sleep(100)
def group(args, samples): return [1.0] * len(samples)
def too_few(args, samples): return [1.0]
"""
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("right", {}, "", ""),
    ("group", {"group_rm": True}, "", ""),
    ("entries", {}, "error", "its reward is a dict with the keys 'score', 'style', and --reward-key is not given"),
    ("nan", {}, "error", "not a number"),
    ("crash", {}, "error", "crash"),
    ("unit", {}, "warning", "error: KeyError: 'units' ["),
    ("slow", {"rm_timeout": 0.5}, "warning", "timeout"),
    ("too_few", {"group_rm": True}, "error", "error: it returned 1 rewards for a group of 2"),
    ("nan", {"custom_generate_function_path": "examples.guess_number.game.generate"}, "warning", "not a number"),
]


@pytest.mark.parametrize(("function", "flags", "severity", "rule"), CASES)
def test_the_first_call_of_a_reward(
    data_file: Callable[..., str], tmp_path: Path, function: str, flags: dict[str, Any], severity: str, rule: str
) -> None:
    (tmp_path / "tried.py").write_text(REWARDS)
    data = data_file([{"prompt": "how long?", "label": "5", "unit": "cm"}])
    path = f"{tmp_path}/tried.py:{function}"
    args = Args(prompt_data=data, label_key="label", custom_rm_path=path, n_samples_per_prompt=2, **flags)
    problems = try_reward(args)
    assert [problem.severity for problem in problems] == ([severity] if severity else [])
    for problem in problems:
        assert str(problem).startswith(
            f"--custom-rm-path {path}: called on the first row with a canned response: {rule}"
        )
    if function == "unit":
        assert f'{tmp_path}/tried.py", line 9, in unit | return sample.row["units"]' in str(problems[0])


def test_without_data_nothing_is_called(tmp_path: Path) -> None:
    (tmp_path / "tried.py").write_text("def f(args, sample): open(__file__ + '.called', 'w')\n")
    for data in (None, str(tmp_path / "none.jsonl")):
        assert try_reward(Args(prompt_data=data, custom_rm_path=f"{tmp_path}/tried.py:f")) == []
    assert not (tmp_path / "tried.py.called").exists()
