"""`--rm-type code` as a run uses it: rows are checked, workers judge, and verdicts reach metadata and metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.config.rules.rewards import line_reward_fault
from slime.core.sample import Sample, Status
from slime.rollout.metrics import verdict_metrics
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.rewards.code import read_code
from slime.sandbox.run import refusal

RIGHT = "<think>```python\ndef add(a, b): return 0\n```</think>So:\n```python\ndef add(a, b):\n    return a + b\n```\n"
HERE = pytest.mark.skipif(refusal("namespaces") is not None, reason="this kernel gives us no namespaces")


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\n1\n```", "1\n"),
        ("```py\r\n1\r\n2\n```<|user|>", "1\r\n2\n"),
        ("```\n1\n```\ntext\n```python\n2\n```\nbye", "2\n"),
        ("```python\n1\n```\n```bash\nls\n```", "1\n"),
        ("```python\n1\n```\n```python\n2", "1\n"),
        ("```python\n'''\n```x\n'''\n```", "'''\n```x\n'''\n"),
        ("```python\n```", ""),
        ("```python\n1\n```\n</think>", None),
        ("print(1)", None),
        ("```print(1)```", None),
        ("```bash\nls\n```", None),
        ("", None),
    ],
)
def test_code_is_the_last_complete_block(response: str, code: str | None) -> None:
    answer = read_code(response)
    assert (None if answer is None else answer.text) == code


def test_rows_without_good_tests_are_refused() -> None:
    args = Args(rm_type="code")
    assert line_reward_fault(args, {}, "code", "assert add(1, 1) == 2") is None
    assert line_reward_fault(args, {"tests": [{"stdout": "1"}]}, "code", None) is None
    fault = line_reward_fault(args, {}, "code", None)
    assert fault is not None and fault[0].startswith("code cannot judge by its tests: there are no tests")
    fault = line_reward_fault(args, {"rm_type": "code"}, "math", "assert 1")
    assert fault is not None and "test 1 asserts something that is always true" in fault[0]
    assert line_reward_fault(args, {}, "math", "1") is None, "control"


@HERE
def test_workers_judge_code_and_faults_fail(tmp_path: Path) -> None:
    """Right, wrong and refused have a reward and a verdict. A fault of the sandbox has neither, and is no 0."""
    test = "assert add(2, 3) == 5"
    cases = {
        "right": (RIGHT, test),
        "wrong": ("no code", test),
        "refused": ("```\ndef add(a, b):\n  import socket\n  socket.socket()\n```", test),
        "fault": ("```\ndef add(a, b): return a\n```", "assert add(lambda: 0, 0) == 5"),
    }
    samples = [
        Sample(index=index, response=response, label=label, status=Status.COMPLETED, metadata={"own": 1})
        for index, (response, label) in enumerate(cases.values())
    ]

    async def judge() -> None:
        pool = RewardPool(Args(rm_type="code", rm_num_workers=1, rm_timeout=60.0), tmp_path)
        try:
            for sample in samples:
                (await pool.judge(sample)).apply(sample)
        finally:
            pool.close()

    asyncio.run(judge())
    assert [sample.reward for sample in samples] == [1.0, 0.0, 0.0, None]
    assert [sample.metadata for sample in samples[:3]] == [
        {"own": 1, "code_verdict": verdict} for verdict in ("right", "wrong", "refused")
    ]
    assert samples[3].status is Status.FAILED and samples[3].metadata == {"own": 1}
    assert str(samples[3].reward_failure).startswith("error: SandboxFault: test 1: a test passes a function")
    metrics = verdict_metrics(samples)
    assert {name: value for name, value in metrics.items() if value} == {
        f"reward/verdict_{name}": pytest.approx(1 / 3) for name in ("right", "wrong", "refused")
    }
    assert len(metrics) == 6 and verdict_metrics([Sample()]) == {}
