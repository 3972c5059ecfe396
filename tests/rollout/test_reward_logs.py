"""The log of a reward worker: prints, logging, children and tracebacks, each line with its sample."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.pool import RewardPool


def log_of(directory: Path, count: int, **flags: Any) -> str:
    args = Args(rm_num_workers=1, **flags)

    async def main() -> None:
        pool = RewardPool(args, directory)
        samples = [Sample(index=number, status=Status.COMPLETED) for number in range(count)]
        try:
            verdicts = await asyncio.gather(*(pool.judge(sample) for sample in samples))
        finally:
            pool.close()
        assert [verdict.reward for verdict in verdicts] == [1.0 if n % 2 == 0 else None for n in range(count)]

    asyncio.run(main())
    return (directory / "reward-0.log").read_text()


def test_a_plain_reward_is_logged_with_samples(tmp_path: Path) -> None:
    text = log_of(tmp_path, 24, custom_rm_path="rewards_for_tests.talks")
    for number in range(24):
        mine = [line.partition(": ")[2] for line in text.splitlines() if line.startswith(f"sample {number}: ")]
        assert mine[0] == f"printed {number}"
        assert f"INFO mine: logged {number}" in mine[1]
        assert mine[2] == f"from a child {number}"
        assert mine[3].startswith("native without an end")
    # Of twelve equal failures the first has its whole traceback, and the tenth is a count.
    assert len(re.findall(r"Traceback \(most recent call last\)", text)) == 1
    assert re.search(r"sample 1: .*rewards_for_tests\.py\", line \d+, in talks", text)
    assert "KeyError: 'unit' (10 failures like this so far)" in text


def test_async_rewards_do_not_mix_their_lines(tmp_path: Path) -> None:
    text = log_of(tmp_path, 16, custom_rm_path="rewards_for_tests.talks_together")
    lines = text.splitlines()
    assert sorted(line for line in lines if "begins" in line) == sorted(f"sample {n}: begins ends" for n in range(16))
    assert len(re.findall(r"Traceback \(most recent call last\)", text)) == 1


def test_a_reward_that_cannot_load_is_quoted(tmp_path: Path) -> None:
    args = Args(rm_num_workers=1, custom_rm_path="rewards_for_tests.coin")

    async def main() -> None:
        pool = RewardPool(args, tmp_path)
        pool._args = Args(rm_num_workers=1, custom_rm_path="none_of_these.coin")
        try:
            await pool.judge(Sample())
        finally:
            pool.close()

    with pytest.raises(
        RuntimeError, match=r"did not start \(.*No module named 'none_of_these'.*; the log is .*reward-0\.log"
    ):
        asyncio.run(main())
