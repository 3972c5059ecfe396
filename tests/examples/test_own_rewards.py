"""The rewards of the example, in the workers that run them."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import Verdict


async def _reply(request: web.Request) -> web.Response:
    """Answer with the number of letters of the answer."""
    text = (await request.json())["messages"][0]["content"]
    answer = text.partition("Answer: ")[2].partition("\n")[0]
    reply = "well ..." if answer == "odd" else str(len(answer))
    return web.json_response({"choices": [{"message": {"content": reply}}]})


def test_a_language_model_as_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[Verdict]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", _reply)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions")
        pool = RewardPool(Args(custom_rm_path="examples.rewards.own_rewards.ask_judge", rm_num_workers=1))
        try:
            responses = ["", "abc", "abcdefghij", "odd"]
            samples = [Sample(prompt="q", response=response) for response in responses]
            return list(await asyncio.gather(*(pool.judge(sample) for sample in samples)))
        finally:
            pool.close()
            await runner.cleanup()

    *numbers, odd = asyncio.run(run())
    assert numbers == [Verdict(0.0), Verdict(0.3), Verdict(1.0)]
    assert odd.failure == "error: ValueError: the judge replied 'well ...', which is not a number from 0 to 10"


def test_the_shortest_right_response_of_a_group() -> None:
    async def run(answers: list[str]) -> list[object]:
        args = Args(custom_rm_path="examples.rewards.own_rewards.shortest_right", group_rm=True, rm_num_workers=1)
        pool = RewardPool(args)
        samples = [
            Sample(label="7", response=rf"</think>\boxed{{{answer}}}", response_length=length, status=Status.COMPLETED)
            for answer, length in zip(answers, (4, 10, 5, 20), strict=True)
        ]
        try:
            await pool.judge_group(samples)
            return [sample.reward for sample in samples]
        finally:
            pool.close()

    assert asyncio.run(run(["8", "7", "7", "7"])) == [0.0, 0.5, 1.0, 0.25]
    assert asyncio.run(run(["8", "8", "8", "8"])) == [0.0] * 4
