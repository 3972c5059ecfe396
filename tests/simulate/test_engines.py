"""Timed engines against arithmetic by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.simulate.clock import VirtualLoop
from slime.simulate.engines import END, FIRST_PROMPT, TimedEngines
from slime.simulate.speeds import EngineSpeed

SPEED = EngineSpeed(step=0.1, request_step=0.1, prefill_token=0.0)


@dataclass
class ByPrompt:
    """Prompt number i gets a response of `responses[i]` tokens, and has `prompts` tokens itself."""

    responses: Sequence[int]
    longest: int = 1000
    prompts: int = 0
    mean: float = 0.0

    def response(self, prompt: int, seed: int) -> int:
        return self.responses[prompt]

    def prompt(self, prompt: int) -> int:
        return self.prompts


def ends(
    lengths: ByPrompt, *, engines: int = 1, limit: int = 100, speed: EngineSpeed = SPEED
) -> tuple[list[float], TimedEngines, float]:
    """Return when each request ends if all begin at 0, the engines, and the wall time with 5 s after the last one."""
    loop = VirtualLoop()

    async def one(client: TimedEngines, prompt: int) -> float:
        await client.generate(request(prompt))
        return loop.time()

    async def all_of_them() -> tuple[list[float], TimedEngines]:
        client = TimedEngines(loop, engines, speed, limit, lengths, 1)
        found = await asyncio.gather(*(one(client, prompt) for prompt in range(len(lengths.responses))))
        await asyncio.sleep(5.0)
        return found, client

    found, client = loop.run_until_complete(all_of_them())
    loop.close()
    return found, client, loop.time()


def request(prompt: int, *, most: int = 1000, done: int = 0) -> GenerateRequest:
    params = SamplingParams(max_new_tokens=most, sampling_seed=7)
    return GenerateRequest(input_ids=[FIRST_PROMPT + prompt] + [0] * done, sampling_params=params)


def test_two_requests_share_an_engine() -> None:
    """Steps of two take 0.3 s, steps of one 0.2 s: 10 x 0.3 = 3 s, then 10 more tokens in 2 s."""
    found, client, _ = ends(ByPrompt([10, 20]))
    assert found == pytest.approx([3.0, 5.0])
    assert client.tokens == 30


def test_a_third_request_waits_for_room() -> None:
    """The third begins at 3 s, next to the second's last 10 tokens, and ends after 10 x 0.3 + 10 x 0.2 s more."""
    found, _, _ = ends(ByPrompt([10, 20, 20]), limit=2)
    assert found == pytest.approx([3.0, 6.0, 8.0])


def test_prefill_goes_first() -> None:
    found, _, _ = ends(ByPrompt([10, 10], prompts=5), speed=EngineSpeed(0.1, 0.1, 0.01))
    assert found == pytest.approx([3.1, 3.1])


def test_a_late_prefill_delays_the_others() -> None:
    """Prefill takes 1 s each: the first one's until 1.0, the second, from 0.5 on, until 2.0; then 10 steps of 0.3 s."""
    loop = VirtualLoop()

    async def late(client: TimedEngines) -> float:
        await asyncio.sleep(0.5)
        await client.generate(request(1))
        return loop.time()

    async def run() -> list[float]:
        client = TimedEngines(loop, 1, EngineSpeed(0.1, 0.1, 0.1), 2, ByPrompt([10, 10], prompts=10), 1)
        second = asyncio.ensure_future(late(client))
        await client.generate(request(0))
        return [loop.time(), await second]

    found = loop.run_until_complete(run())
    loop.close()
    assert found == pytest.approx([5.0, 5.0])


def test_busy_and_idle_make_the_wall_time() -> None:
    _, client, wall = ends(ByPrompt([10, 20, 7, 3]), engines=3)
    for engine in client.engines:
        times = engine.settle()
        assert times.busy + times.idle == pytest.approx(wall)
        assert times.busy > 0
        assert times.idle >= 5.0


def test_requests_go_to_the_emptiest_engine() -> None:
    """Two engines get two of four requests each."""
    found, _, _ = ends(ByPrompt([10, 10, 10, 10]), engines=2)
    assert found == pytest.approx([3.0] * 4)


@pytest.mark.parametrize("limit", [3, 100])
def test_more_engines_are_never_slower(limit: int) -> None:
    walls = [max(ends(ByPrompt([40] * 24), engines=engines, limit=limit)[0]) for engines in (1, 2, 3, 4, 6, 12, 24)]
    assert walls == sorted(walls, reverse=True)
    assert walls[-1] < walls[0]
    uneven = [max(ends(ByPrompt([40, 400]), engines=engines, limit=1)[0]) for engines in (1, 2)]
    assert uneven[1] == pytest.approx(80.0)  # control: the longest response bounds it


def aborted_at(seconds: float) -> list[GenerateResponse]:
    """Abort requests of 10 and 20 tokens, and one that waits, after `seconds`."""
    loop = VirtualLoop()

    async def run() -> list[GenerateResponse]:
        client = TimedEngines(loop, 1, EngineSpeed(0.1, 0.1, 0.0), 2, ByPrompt([10, 20, 5]), 1)
        tasks = [asyncio.ensure_future(client.generate(request(prompt))) for prompt in range(3)]
        await asyncio.sleep(seconds)
        await client.abort_all()
        return list(await asyncio.gather(*tasks))

    found = loop.run_until_complete(run())
    loop.close()
    return found


def test_an_aborted_request_has_its_tokens() -> None:
    first, second, third = aborted_at(1.55)
    assert [len(answer.output_ids) for answer in (first, second, third)] == [5, 5, 0]
    assert {answer.finish_reason for answer in (first, second, third)} == {"abort"}
    first, second, third = aborted_at(3.05)
    assert (first.finish_reason, first.output_ids[-1]) == ("stop", END)
    assert [len(answer.output_ids) for answer in (first, second, third)] == [10, 10, 0]


def test_a_continued_response_keeps_its_length() -> None:
    loop = VirtualLoop()

    async def run() -> list[GenerateResponse]:
        client = TimedEngines(loop, 1, EngineSpeed(0.1, 0.0, 0.0), 2, ByPrompt([10]), 1)
        return [await client.generate(request(0, most=4)), await client.generate(request(0, done=4))]

    first, second = loop.run_until_complete(run())
    loop.close()
    assert (len(first.output_ids), first.finish_reason) == (4, "length")
    assert (len(second.output_ids), second.finish_reason) == (6, "stop")
