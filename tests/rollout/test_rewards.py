from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import TIMEOUT, Verdict, failure_kind


def test_importing_rewards_is_light() -> None:
    """A worker with a function of its own loads no grader, and the graders' records load no heavy package."""
    heavy = "print([m for m in ('torch', 'sympy', 'transformers', 'ray', 'aiohttp') if m in sys.modules])"
    code = (
        f"import sys, slime.rollout.reward_pool.worker as worker; {heavy}; "
        "print([m for m in sys.modules if m.startswith('slime.rollout.rewards.') and not m.endswith('.reward')]); "
        f"worker.load_rewards(); {heavy}"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["[]"] * 3


T = TypeVar("T")


def with_pool(args: Args, work: Callable[[RewardPool], Awaitable[T]]) -> T:
    async def run() -> T:
        pool = RewardPool(args)
        try:
            return await work(pool)
        finally:
            pool.close()

    return asyncio.run(run())


def _judge(args: Args, labels: list[str]) -> tuple[list[Verdict], float]:
    """Judge all at once; return the verdicts, and the seconds that it took at least."""

    async def work(pool: RewardPool) -> tuple[list[Verdict], float]:
        await pool.judge(Sample(label="1", response=r"</think>\boxed{1}"))  # workers are up after this
        start = time.perf_counter()
        samples = [
            Sample(index=n, label=label, response=rf"</think>\boxed{{{label}}}") for n, label in enumerate(labels)
        ]
        verdicts = await asyncio.gather(*(pool.judge(sample) for sample in samples))
        return list(verdicts), time.perf_counter() - start

    return with_pool(args, work)


BAD = ["hang", "exit", "segfault", "kill", "raise", "nan", "inf", "text", "none", "dict", "empty dict", "bool", "print"]


@pytest.fixture(scope="module", params=["by_label", "by_label_async"])
def bad_verdicts(request: pytest.FixtureRequest) -> Iterator[dict[str, Verdict]]:
    args = Args(custom_rm_path=f"rewards_for_tests.{request.param}", rm_timeout=1.5)
    verdicts, _ = _judge(args, [*BAD, *(str(n) for n in range(20))])
    assert [verdict.reward for verdict in verdicts[len(BAD) :]] == [float(n) for n in range(20)]
    yield dict(zip(BAD, verdicts, strict=False))


def test_a_bad_reward_costs_its_own_sample_only(bad_verdicts: dict[str, Verdict]) -> None:
    assert bad_verdicts["hang"] == Verdict(None, "timeout")
    for death in ("exit", "segfault", "kill"):
        assert bad_verdicts[death] == Verdict(None, "crash"), death
    assert bad_verdicts["raise"] == Verdict(None, "error: KeyError: 'no such thing'")
    for nonsense in ("nan", "inf", "text", "none", "empty dict"):
        assert bad_verdicts[nonsense] == Verdict(None, "not a number"), nonsense
    assert bad_verdicts["dict"] == Verdict({"right": 1.0, "short": 0.5})
    assert bad_verdicts["bool"] == Verdict(1.0)
    assert bad_verdicts["print"] == Verdict(0.25)


def test_nobody_waits_for_a_reward_that_hangs() -> None:
    """The time limit is far away, so the others have their rewards long before the sample that hangs."""

    async def work(pool: RewardPool) -> list[Verdict]:
        hang = asyncio.create_task(pool.judge(Sample(label="hang")))
        verdicts = await asyncio.gather(*(pool.judge(Sample(label=str(n))) for n in range(20)))
        assert not hang.done()
        return verdicts

    args = Args(custom_rm_path="rewards_for_tests.by_label", rm_num_workers=2, rm_timeout=120)
    assert with_pool(args, work) == [Verdict(float(n)) for n in range(20)]


def test_a_leaking_reward_costs_no_sample() -> None:
    """Each call keeps 40 MB, and a worker may grow by 100 MB: all samples are judged, by several processes."""

    async def work(pool: RewardPool) -> tuple[list[Verdict], int]:
        verdicts, most = [], 0
        for _ in range(8):
            verdicts.append(await pool.judge(Sample(label="40")))
            most = max([most, *(worker.grown for worker in pool.workers)])
        return verdicts, most

    args = Args(custom_rm_path="rewards_for_tests.leaks", rm_num_workers=1, rm_worker_memory=0.1)
    verdicts, most = with_pool(args, work)
    assert [verdict.failure for verdict in verdicts] == [None] * 8
    assert len({verdict.reward for verdict in verdicts}) > 1
    assert most < 300e6
    kept, most = with_pool(replace(args, rm_worker_memory=4.0), work)
    assert len({verdict.reward for verdict in kept}) == 1
    assert most > 300e6, "without a limit it would have grown"


def test_a_growing_reward_costs_only_its_sample() -> None:
    async def work(pool: RewardPool) -> list[Verdict]:
        labels = ["0", "grow", "0", "0"]
        return list(await asyncio.gather(*(pool.judge(Sample(label=label)) for label in labels)))

    args = Args(custom_rm_path="rewards_for_tests.leaks", rm_num_workers=1, rm_worker_memory=0.1, rm_timeout=20)
    first, grown, *after = with_pool(args, work)
    assert grown == Verdict(None, "memory")
    assert first.failure is None
    assert [verdict.failure for verdict in after] == [None, None]
    assert after[0].reward != first.reward, "another process"


def test_async_rewards_wait_at_the_same_time() -> None:
    """Each call waits until as many as its label says have begun, and returns how many there were at most."""
    args = Args(custom_rm_path="rewards_for_tests.waits_for_others", rm_num_workers=1, rm_concurrency=64)
    for concurrency in (64, 4):
        verdicts, _ = _judge(replace(args, rm_concurrency=concurrency), [str(concurrency)] * 64)
        assert verdicts == [Verdict(float(concurrency))] * 64
    plain = replace(args, custom_rm_path="rewards_for_tests.sleeps")
    _, one_by_one = _judge(plain, ["0.1"] * 8)
    assert one_by_one > 0.7


GUILTY = {
    "block": "timeout",
    "regex": "timeout",
    "swallow": "timeout",
    "exit": "crash",
    "sys.exit": "crash",
    "cancelled": "error: CancelledError: ",
}
"""Async rewards that misbehave in a shared worker, and the failure of each."""


def test_a_hang_costs_no_other_async_task() -> None:
    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=2, rm_timeout=1.0)
    innocent = ["0.3"] * 10
    labels = [*innocent, *GUILTY, *innocent]
    verdicts, _ = _judge(args, labels)
    for label, verdict in zip(labels, verdicts, strict=True):
        assert verdict == (Verdict(None, GUILTY[label]) if label in GUILTY else Verdict(1.0)), label


def test_an_unknown_culprit_judges_all_again_alone() -> None:
    """The process ends in a callback of the loop, in which no task's code runs."""
    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=1, rm_timeout=2.0)
    labels = ["0.2", "0.2", "exit later", "0.2", "0.2", "exit later", "0.2"]
    verdicts, _ = _judge(args, labels)
    crash = Verdict(None, "crash")
    assert verdicts == [crash if label == "exit later" else Verdict(1.0) for label in labels]


def test_time_blocked_by_another_task_is_free() -> None:
    """Two waits of 0.6 s are interrupted by a block of 0.9 s, under a limit of 1.5 s."""
    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=1, rm_timeout=1.5)
    verdicts, seconds = _judge(args, ["two waits", "blocks for 0.9 s"])
    assert seconds > 1.5
    assert verdicts == [Verdict(1.0), Verdict(1.0)]
    [late], _ = _judge(args, ["3.0"])
    assert late == Verdict(None, "timeout")


def test_a_dead_worker_with_a_child_is_noticed() -> None:
    """The child keeps the connection open for longer than the time limit, which would be a timeout."""
    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=1, rm_timeout=30)
    verdicts, _ = _judge(args, ["0.1", "exit and leave a child", "0.1"])
    assert verdicts == [Verdict(1.0), Verdict(None, "crash"), Verdict(1.0)]


def test_a_cancelled_caller_makes_room() -> None:
    async def work(pool: RewardPool) -> Verdict:
        await pool.judge(Sample(label="0.0"))
        hangs = [asyncio.create_task(pool.judge(Sample(label="1000"))) for _ in range(3)]  # one in flight, two waiting
        await asyncio.sleep(0.2)
        for task in hangs:
            task.cancel()
        async with asyncio.timeout(60):
            return await pool.judge(Sample(label="0.0"))

    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=1, rm_concurrency=1, rm_timeout=600)
    assert with_pool(args, work) == Verdict(1.0)


def test_closing_raises_for_all_who_wait() -> None:
    async def work(pool: RewardPool) -> list[BaseException | Verdict]:
        await pool.judge(Sample(label="0.0"))
        tasks = [asyncio.create_task(pool.judge(Sample(label="100"))) for _ in range(3)]
        await asyncio.sleep(0.1)
        pool.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(RuntimeError, match="closed"):
            await pool.judge(Sample(label="0.0"))
        return results

    args = Args(custom_rm_path="rewards_for_tests.misbehaves", rm_num_workers=1, rm_concurrency=2, rm_timeout=60)
    assert [str(result) for result in with_pool(args, work)] == ["the reward workers are closed"] * 3


def test_closing_after_the_loop_is_gone() -> None:
    pool = RewardPool(Args(custom_rm_path="rewards_for_tests.by_label", rm_num_workers=1))
    assert asyncio.run(pool.judge(Sample(label="1"))) == Verdict(1.0)
    [worker] = pool.workers
    with pytest.raises(RuntimeError, match="belong to the event loop"):
        asyncio.run(pool.judge(Sample(label="1")))
    pool.close()
    assert not _alive(worker.pid)


def test_an_idle_worker_that_dies_is_replaced() -> None:
    async def work(pool: RewardPool) -> list[Verdict]:
        first = await pool.judge(Sample(label="1"))
        [worker] = pool.workers
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while worker in pool.workers and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        return [first, await pool.judge(Sample(label="2"))]

    args = Args(custom_rm_path="rewards_for_tests.by_label", rm_num_workers=1)
    assert with_pool(args, work) == [Verdict(1.0), Verdict(2.0)]


def test_metadata_that_cannot_be_pickled_fails() -> None:
    async def work(pool: RewardPool) -> Verdict:
        return await pool.judge(Sample(label="1", metadata={"lock": threading.Lock()}))

    verdict = with_pool(Args(custom_rm_path="rewards_for_tests.by_label"), work)
    assert "cannot pickle" in (verdict.failure or "")


@pytest.mark.parametrize("name", ["group", "group_async"])
def test_a_group_is_judged_in_one_call(name: str) -> None:
    """The labels of a group name what the function does to it."""
    groups = {
        "rank": ["rank"] * 4,
        "array": ["array"] * 3,
        "dicts": ["dicts"] * 2,
        "one is none": ["none", "1", "nan"],
        "short": ["short"] * 3,
        "number": ["number"] * 2,
        "raise": ["raise"] * 2,
        "exit": ["exit"] * 2,
        "hang": ["hang"] * 2,
    }

    async def work(pool: RewardPool) -> dict[str, list[Sample]]:
        judged = {
            what: [Sample(index=n, label=label, status=Status.COMPLETED) for n, label in enumerate(labels)]
            for what, labels in groups.items()
        }
        left_out = [Sample(status=Status.FAILED), Sample(status=Status.COMPLETED, reward=7.0)]
        judged["rank"] += left_out
        await asyncio.gather(*(pool.judge_group(samples) for samples in judged.values()))
        await pool.judge_group(left_out)  # nothing to judge
        with pytest.raises(ValueError, match="--group-rm"):
            await pool.judge(Sample())
        return judged

    args = Args(custom_rm_path=f"rewards_for_tests.{name}", group_rm=True, rm_num_workers=2, rm_timeout=1.5)
    judged = with_pool(args, work)
    rewards = {what: [sample.reward for sample in samples] for what, samples in judged.items()}
    assert rewards["rank"] == [0.0, 1.0, 2.0, 3.0, None, 7.0]
    assert rewards["array"] == [0.0, 0.5, 1.0]
    assert rewards["dicts"] == [{"a": 1.0, "b": 0.5}] * 2
    assert rewards["one is none"] == [None, 1.0, None]
    failures = {what: [sample.reward_failure for sample in samples] for what, samples in judged.items()}
    assert failures["one is none"] == ["not a number", None, "not a number"]
    assert failures["short"] == ["error: it returned 2 rewards for a group of 3"] * 3
    assert failures["number"] == ["error: it returned a float for a group, not a list of rewards"] * 2
    assert failures["raise"] == ["error: KeyError: 'no such thing'"] * 2
    assert failures["exit"] == ["crash"] * 2
    assert failures["hang"] == ["timeout"] * 2
    failed = [sample for what in ("short", "raise", "exit", "hang") for sample in judged[what]]
    assert {sample.status for sample in failed} == {Status.FAILED}


def test_a_failed_verdict_marks_its_sample() -> None:
    sample = Sample(status=Status.COMPLETED)
    Verdict(None, "error: KeyError: 'x'").apply(sample)
    assert (sample.status, sample.reward) == (Status.FAILED, None)
    assert failure_kind("error: KeyError: 'x'") == "error"
    assert failure_kind("not a number") == "not_a_number"
    kept = Sample(status=Status.TRUNCATED)
    Verdict(0.0).apply(kept)
    assert (kept.status, kept.reward) == (Status.TRUNCATED, 0.0)


def test_256_samples_barely_block_the_event_loop() -> None:
    start = time.process_time()
    verdicts, seconds = _judge(Args(rm_type="deepscaler"), [str(n) for n in range(256)])
    ours = time.process_time() - start
    assert all(verdict == Verdict(1.0) for verdict in verdicts)
    print(f"256 rewards in {seconds:.3f} s, with {ours:.3f} s of computation in the process that asks")
    assert ours < 0.5


@pytest.fixture(scope="module")
def built_in() -> dict[str, Verdict]:
    """Verdicts of one worker of --rm-type deepscaler, one after another."""
    wrong = Sample(index=5, label="1", response="nothing")
    asked = {
        "huge": (Sample(label="10", response=r"</think>\boxed{10^{10^{10}}}"), None),
        "after it": (Sample(label="10", response=r"</think>\boxed{10}"), None),
        "wrong": (wrong, None),
        "wrong, drawn": (wrong, "random"),
        "unknown type": (Sample(label="1", metadata={"rm_type": "bogus"}), "random"),
        "no label": (Sample(response=r"</think>\boxed{1}"), None),
    }

    async def work(pool: RewardPool) -> dict[str, Verdict]:
        return {name: await pool.judge(sample, rm_type=rm_type) for name, (sample, rm_type) in asked.items()}

    return with_pool(Args(rm_type="deepscaler", rm_timeout=5.0, rm_num_workers=1), work)


def test_an_answer_too_large_to_compute_is_wrong(built_in: dict[str, Verdict]) -> None:
    assert built_in["huge"] == Verdict(0.0)
    assert built_in["after it"] == Verdict(1.0)


def test_the_samples_metadata_chooses_the_reward(built_in: dict[str, Verdict]) -> None:
    assert built_in["wrong"] == Verdict(0.0)
    assert built_in["wrong, drawn"].reward in (0.0, 1.0)
    assert "bogus" in (built_in["unknown type"].failure or "")


def test_a_missing_label_is_a_failure(built_in: dict[str, Verdict]) -> None:
    assert "no label" in (built_in["no label"].failure or "")


def test_metadata_alone_may_choose_the_reward() -> None:
    async def run() -> list[Verdict]:
        pool = RewardPool(Args(rm_num_workers=1))
        try:
            response = r"</think>\boxed{1}"
            named = [
                Sample(label="1", response=response, metadata={"rm_type": name}) for name in ("deepscaler", "bogus")
            ]
            verdicts = [await pool.judge(sample) for sample in named]
            for metadata in ({}, {"rm_type": None}):
                with pytest.raises(ValueError, match=r"--rm-type: not given.*metadata\.rm_type"):
                    await pool.judge(Sample(label="1", response=response, metadata=metadata))
            return verdicts
        finally:
            pool.close()

    right, unknown = asyncio.run(run())
    assert right == Verdict(1.0)
    assert unknown.reward is None
    assert "bogus" in (unknown.failure or "")


def test_the_first_sample_starts_workers_without_penalty() -> None:
    async def run() -> None:
        pool = RewardPool(Args(rm_type="deepscaler", rm_num_workers=2, rm_timeout=0.2))
        try:
            assert not pool.workers
            start = time.perf_counter()
            verdict = await pool.judge(Sample(label="1", response=r"</think>\boxed{1}"))
            assert time.perf_counter() - start > 0.2  # a fresh interpreter that loads sympy
            assert verdict == Verdict(1.0)
            assert len(pool.workers) == 2
        finally:
            pool.close()

    asyncio.run(run())


def test_async_rewards_run_in_workers_one_loop_each() -> None:
    async def run(name: str) -> list[float | dict[str, float] | None]:
        pool = RewardPool(Args(custom_rm_path=f"rewards_for_tests.{name}", rm_num_workers=1))
        try:
            return [(await pool.judge(Sample())).reward for _ in range(3)]
        finally:
            pool.close()

    assert asyncio.run(run("loops_seen")) == [1, 1, 1]
    assert os.getpid() not in asyncio.run(run("process_id"))


def test_an_unknown_reward_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--rm-type dopa.*deepscaler"):
        RewardPool(Args(rm_type="dopa"))
    with pytest.raises(ValueError, match="--rm-url: not given"):
        RewardPool(Args(rm_type="boxed_remote_rm"))
    RewardPool(Args(rm_type="dopa", custom_rm_path="rewards_for_tests.coin")).close()  # the type is not used
    with pytest.raises(ValueError, match="--custom-rm-path"):
        RewardPool(Args(custom_rm_path="rewards_for_tests.missing"))


def test_judging_without_a_reward_is_an_error() -> None:
    pool = RewardPool(Args())
    with pytest.raises(ValueError, match="--rm-type"):
        asyncio.run(pool.judge(Sample()))
    assert not pool.workers
    pool.close()


def test_a_worker_that_cannot_start_fails_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = 'import sys\nassert not sys.argv[0].endswith("worker.py")\ndef reward(args, sample): return 1.0\n'
    (tmp_path / "fails_in_workers.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)

    async def run() -> list[Verdict | BaseException]:
        pool = RewardPool(Args(custom_rm_path="fails_in_workers.reward", rm_num_workers=2))
        try:
            return await asyncio.gather(*(pool.judge(Sample()) for _ in range(6)), return_exceptions=True)
        finally:
            pool.close()

    results = asyncio.run(asyncio.wait_for(run(), 30))
    assert {str(result)[:32] for result in results} == {"a reward worker did not start (e"}


def test_args_that_no_worker_can_get_fail_everything() -> None:
    unpicklable: Any = threading.Lock()
    args = Args(custom_rm_path="rewards_for_tests.by_label", reward_key=unpicklable)

    async def work(pool: RewardPool) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"a reward worker did not start \(cannot pickle"):
                await asyncio.wait_for(pool.judge(Sample(label="1")), 60)
        assert not pool.workers

    with_pool(args, work)


def sleepers(seconds: str) -> list[int]:
    """Return processes that sleep for this number of seconds, which only this test uses."""
    return [one.pid for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", seconds]]


def gone(seconds: str) -> bool:
    deadline = time.monotonic() + 20
    while sleepers(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not sleepers(seconds)


def test_a_rewards_own_session_ends_with_its_worker() -> None:
    """The worker is killed for its time limit, ends with the pool, or loses its owner."""
    seconds = str(100_000 + os.getpid())

    async def work(pool: RewardPool) -> list[Verdict]:
        verdicts = [await pool.judge(Sample(label=seconds))]
        assert len(sleepers(seconds)) == 1, "control: it is there while the worker is"
        verdicts.append(await pool.judge(Sample(label="hang")))
        assert await asyncio.to_thread(gone, seconds)
        verdicts.append(await pool.judge(Sample(label=seconds)))
        assert len(sleepers(seconds)) == 1
        return verdicts

    args = Args(custom_rm_path="rewards_for_tests.leaves_a_sleeper", rm_num_workers=1, rm_timeout=1.0)
    assert with_pool(args, work) == [Verdict(1.0), Verdict(None, TIMEOUT), Verdict(1.0)]
    assert gone(seconds)
    code = (
        "import asyncio, os, signal\n"
        "from slime.config.args import Args\n"
        "from slime.core.sample import Sample\n"
        "from slime.rollout.reward_pool.pool import RewardPool\n"
        "async def run():\n"
        "    pool = RewardPool(Args(custom_rm_path='rewards_for_tests.leaves_a_sleeper', rm_num_workers=1))\n"
        f"    print(await pool.judge(Sample(label='{seconds}')), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(run())\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment()).stdout
    assert "reward=1.0" in output
    assert gone(seconds)


def test_workers_end_with_their_owner() -> None:
    """This also ends a worker that hangs, and holds if the owner is killed."""
    code = (
        "import asyncio, os, signal, sys\n"
        "from slime.config.args import Args\n"
        "from slime.core.sample import Sample\n"
        "from slime.rollout.reward_pool.pool import RewardPool\n"
        "async def run():\n"
        "    pool = RewardPool(Args(custom_rm_path='rewards_for_tests.by_label', rm_num_workers=2))\n"
        "    await pool.judge(Sample(label='1'))\n"
        "    hang = asyncio.create_task(pool.judge(Sample(label='hang')))\n"
        "    await asyncio.sleep(0.5)\n"
        "    print(*(worker.pid for worker in pool.workers), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(run())\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment()).stdout
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
