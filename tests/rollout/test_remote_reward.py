"""remote_rm against an HTTP server that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from aiohttp import web

from slime.config.args import Args
from slime.core.masking import Masker
from slime.core.sample import Sample
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import Verdict, failure_kind
from slime.rollout.rewards.remote import answer_verdict

T = TypeVar("T")


class Judge:
    """Answers each request as its label names; it remembers the requests, and how many came at once."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.times: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        label = body["label"]
        self.asked.append(body)
        self.times[label] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._misbehave(request, label)
        finally:
            self.in_flight -= 1

    async def _misbehave(self, request: web.Request, label: str) -> web.StreamResponse:
        first = self.times[label] == 1
        what, _, rest = label.partition(" ")
        match what:
            case "json":
                return web.Response(text=rest)
            case "500-then-200" if first:
                return web.Response(status=500, text="warming up")
            case "drop-then-200" if first:
                assert request.transport is not None
                request.transport.abort()
            case "drop":
                assert request.transport is not None
                request.transport.abort()
            case "status":
                return web.Response(status=int(rest), text="no such luck", headers={"Location": "/elsewhere"})
            case "slow":
                await asyncio.sleep(float(rest))
            case "cut":
                answer = web.StreamResponse(headers={"Content-Length": "100"})
                await answer.prepare(request)
                await answer.write(b"0.5")
                assert request.transport is not None
                request.transport.close()
                return answer
        return web.Response(text="0.5")


def with_judge(work: Callable[[RewardPool, Judge], Awaitable[T]], **kwargs: Any) -> tuple[T, Judge]:
    """Run `work` with a pool for a judge on a local port."""

    async def run() -> tuple[T, Judge]:
        judge = Judge()
        app = web.Application()
        app.router.add_post("/judge", judge.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        defaults: dict[str, Any] = {"rm_type": "remote_rm", "rm_url": f"http://{host}:{port}/judge"}
        pool = RewardPool(Args(**{**defaults, **kwargs}))
        before = asyncio.all_tasks()
        try:
            result = await work(pool, judge)
            assert not pool.workers, "nothing of it runs in a worker"
            assert pool._remote is not None
            assert pool._remote._session is None, "no connection is left"
            assert {task for task in asyncio.all_tasks() - before if "RequestHandler" not in repr(task)} == set()
        finally:
            pool.close()
            await runner.cleanup()
        return result, judge

    return asyncio.run(run())


def judged(*labels: str, **kwargs: Any) -> tuple[dict[str, Verdict], Judge]:
    async def work(pool: RewardPool, judge: Judge) -> dict[str, Verdict]:
        verdicts = await asyncio.gather(*(pool.judge(Sample(label=label, response="r")) for label in labels))
        return dict(zip(labels, verdicts, strict=True))

    return with_judge(work, **kwargs)


ANSWERS: dict[str, Verdict] = {
    "json 0.25": Verdict(0.25),
    "json -3": Verdict(-3.0),
    'json {"reward": 1}': Verdict(1.0),
    'json {"score": 0.5, "why": "half right"}': Verdict(0.5),
    'json {"reward": {"acc": 1, "short": 0.5}}': Verdict({"acc": 1.0, "short": 0.5}),
    'json {"why": "no number"}': Verdict(None, "not a number"),
    'json {"reward": null, "score": 1}': Verdict(None, "not a number"),
    "json null": Verdict(None, "not a number"),
    'json "1.0"': Verdict(None, "not a number"),
    "json [1.0]": Verdict(None, "not a number"),
    "500-then-200": Verdict(0.5),
    "drop-then-200": Verdict(0.5),
    "slow 0.1": Verdict(0.5),
    "slow 100": Verdict(None, "timeout"),
}
FAILURES = {
    "json NaN": "error: --rm-url answered what is not JSON",
    "json <html>": "error: --rm-url answered what is not JSON",
    "json ": "error: --rm-url answered what is not JSON",
    "status 404": "error: --rm-url answered 404: no such luck",
    "status 302": "error: --rm-url answered 302",
    "status 503": "error: --rm-url answered 503: no such luck",
    "drop": "error: --rm-url did not answer: ServerDisconnectedError",
    "cut": "error: --rm-url did not answer: ClientPayloadError",
}


def test_every_way_to_answer() -> None:
    verdicts, judge = judged(*ANSWERS, *FAILURES, rm_timeout=4.5)
    assert {label: verdicts[label] for label in ANSWERS} == ANSWERS
    for label, failure in FAILURES.items():
        assert verdicts[label].reward is None
        assert (verdicts[label].failure or "").startswith(failure), (label, verdicts[label])
        assert failure_kind(verdicts[label].failure or "") == "error"
    asked = {"500-then-200": 2, "drop-then-200": 2, "status 503": 6, "drop": 6, "status 404": 1, "json <html>": 1}
    assert {label: judge.times[label] for label in asked} == asked


@pytest.mark.parametrize(
    ("answer", "key", "expected"),
    [
        ('{"acc": 1, "reward": 0.5}', "acc", {"acc": 1.0, "reward": 0.5}),
        ('{"acc": 1}', "acc", {"acc": 1.0}),
        ('{"reward": {"acc": 1}, "acc": 0}', "acc", {"acc": 1.0}),
        ('{"reward": 0.5, "x": 1}', "acc", 0.5),
        ('{"reward": 0.5, "score": 1}', None, 0.5),
        ('{"x": 1}', "acc", None),
        ('{"acc": 1}', None, None),
    ],
)
def test_the_reward_inside_an_answer(answer: str, key: str | None, expected: object) -> None:
    assert answer_verdict(answer.encode(), Masker(()), key).reward == expected


def test_retries_end_with_the_time_limit() -> None:
    """The waits before the six attempts are 0, 0.1, 0.2, 0.4, 0.8 and 1.6 s, of which five fit into 2 s."""

    async def work(pool: RewardPool, judge: Judge) -> Verdict:
        return await pool.judge(Sample(label="status 500"))

    verdict, judge = with_judge(work, rm_timeout=2.0)
    assert (verdict.failure or "").startswith("error: --rm-url answered 500")
    assert 2 <= judge.times["status 500"] <= 5


def test_a_judge_that_does_not_listen() -> None:
    async def work(pool: RewardPool, judge: Judge) -> Verdict:
        return await pool.judge(Sample(label="1"))

    verdict, _ = with_judge(work, rm_url="http://127.0.0.1:9/judge", rm_timeout=1.0)
    assert (verdict.failure or "").startswith("error: --rm-url did not answer: ClientConnectorError")


@pytest.mark.parametrize("concurrency", [256, 16])
def test_concurrent_requests_stay_within_the_limit(concurrency: int) -> None:
    async def work(pool: RewardPool, judge: Judge) -> list[Verdict]:
        return await asyncio.gather(*(pool.judge(Sample(label="slow 0.2")) for _ in range(64)))

    verdicts, judge = with_judge(work, rm_concurrency=concurrency, rm_timeout=30.0)
    assert verdicts == [Verdict(0.5)] * 64
    assert judge.most_in_flight == min(64, concurrency)


def test_the_judge_is_sent_the_sample() -> None:
    messages = [{"role": "user", "content": "1 + 1 = ?"}]

    async def work(pool: RewardPool, judge: Judge) -> list[Verdict]:
        return [
            await pool.judge(Sample(prompt=messages, response=r"so \boxed{2}", label="json 1", metadata={"k": [1]})),
            await pool.judge(Sample(response=r"so \boxed{2}", label="json 1", metadata={"rm_type": "boxed_remote_rm"})),
            await pool.judge(Sample(response="no box", label="json 1"), rm_type="boxed_remote_rm"),
            await pool.judge(Sample(label="json 1", metadata={"set": {1}})),
        ]

    verdicts, judge = with_judge(work)
    assert verdicts[:3] == [Verdict(1.0)] * 3
    assert "not JSON serializable" in (verdicts[3].failure or "")
    body = {"prompt": messages, "response": r"so \boxed{2}", "label": "json 1", "metadata": {"k": [1]}, "row": {}}
    assert judge.asked[0] == body
    assert [asked["response"] for asked in judge.asked] == [r"so \boxed{2}", "2", ""]


def test_a_small_row_is_sent_too() -> None:
    """A row that is large, or is no JSON, is left out; the sample is judged all the same."""
    rows: list[dict[str, Any]] = [{"unit": "cm"}, {"page": "x" * 70_000}, {"image": b"png"}]

    async def work(pool: RewardPool, judge: Judge) -> list[Verdict]:
        return [await pool.judge(Sample(label="json 1", row=row)) for row in rows]

    verdicts, judge = with_judge(work)
    assert verdicts == [Verdict(1.0)] * 3
    assert [asked["row"] for asked in judge.asked] == [{"unit": "cm"}, None, None]


def test_a_cancelled_caller_ends_the_request() -> None:
    async def work(pool: RewardPool, judge: Judge) -> None:
        task = asyncio.create_task(pool.judge(Sample(label="slow 100")))
        while not judge.in_flight:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        deadline = time.monotonic() + 10
        while judge.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    _, judge = with_judge(work, rm_timeout=60)
    assert (len(judge.asked), judge.in_flight) == (1, 0)
