from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.rm_hub import RewardPool
from slime.rollout.rm_hub.deepscaler import boxed_answer, deepscaler
from slime.rollout.rm_hub.verdict import Verdict, failure_kind

R = "2+2</think>so "


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (R + r"\boxed{34}", "34", 1),
        (R + r"\boxed{35}", "34", 0),
        (R + r"\boxed{34}<|user|>", "34", 1),
        (r"\boxed{34}", "34", 0),  # no </think>
        (r"\boxed{34}</think> 34", "34", 0),  # boxed before it only
        (r"\boxed{1}</think>\boxed{34}</think>\boxed{7}", "7", 1),  # the last </think> counts
        (r"</think>\boxed{34}</think>", "34", 0),
        (R + r"\boxed{1} no, \boxed{34}", "34", 1),
        (R + r"\boxed{34} no, \boxed{1}", "34", 0),
        (R + r"\boxed{34} no, \boxed{1", "34", 0),  # the last one does not close
        (R + r"\boxed{\boxed{34}}", "34", 1),
        (R + r"\boxed {34}", "34", 1),
        (R + r"\boxed{}", "34", 0),
        (R + "34", "34", 0),
        (R + r"\boxed{\frac{1}{2}}", "0.5", 1),
        (R + r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (R + r"\boxed{\dfrac{2}{4}}", r"\frac12", 1),
        (R + r"\boxed{1/3}", "0.333", 0),
        (R + r"\boxed{3}", "3.0", 1),
        (R + r"\boxed{007}", "7", 1),
        (R + r"\boxed{-7}", "7", 0),
        (R + r"\boxed{$34$}", "34", 1),
        (R + r"\boxed{x=34}", "34", 1),
        (R + r"\boxed{1,234}", "1234", 1),
        (R + r"\boxed{\{2,1\}}", r"\{1,2\}", 1),
        (R + r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
        (R + r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
        (R + r"\boxed{34}", r"The answer is \boxed{34}", 1),
        (R + r"\boxed{34, 35}", "34", 0),
        (R + r"\boxed{__import__('os').abort()}", "34", 0),
        ("", "34", 0),
        (R + r"\boxed{34}", "", 0),
    ],
)
def test_deepscaler_rule(response: str, label: str, expected: float) -> None:
    assert deepscaler(response, label) == expected


def test_boxed_answer_keeps_nested_and_escaped_braces() -> None:
    assert boxed_answer(R + r"\boxed{\frac{1}{\sqrt{2}} \} }.") == r"\frac{1}{\sqrt{2}} \} "


def test_importing_rewards_is_light() -> None:
    """A worker starts with this import; torch and sympy would cost it seconds."""
    code = (
        "import sys, slime.rollout.rm_hub.worker; "
        "print([m for m in ('torch', 'sympy', 'transformers', 'ray') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def _judge(args: Args, labels: list[str], **kwargs: Any) -> tuple[list[Verdict], float]:
    """All at once, and the seconds that it took."""

    async def run() -> tuple[list[Verdict], float]:
        pool = RewardPool(args)
        try:
            await pool.judge(Sample(label="1", response=r"</think>\boxed{1}"))  # workers are up after this
            start = time.perf_counter()
            samples = [
                Sample(index=n, label=label, response=rf"</think>\boxed{{{label}}}") for n, label in enumerate(labels)
            ]
            verdicts = await asyncio.gather(*(pool.judge(sample, **kwargs) for sample in samples))
            return list(verdicts), time.perf_counter() - start
        finally:
            pool.close()

    return asyncio.run(run())


BAD = ["hang", "exit", "raise", "nan", "text", "none", "dict", "empty dict", "bool", "print"]


@pytest.fixture(scope="module", params=["by_label", "by_label_async"])
def bad_verdicts(request: pytest.FixtureRequest) -> Iterator[dict[str, Verdict]]:
    args = Args(custom_rm_path=f"rewards_for_tests.{request.param}", rm_timeout=1.5)
    verdicts, seconds = _judge(args, [*BAD, *(str(n) for n in range(20))])
    assert seconds < 6
    assert [verdict.reward for verdict in verdicts[len(BAD) :]] == [float(n) for n in range(20)]
    yield dict(zip(BAD, verdicts, strict=False))


def test_a_bad_reward_costs_its_own_sample_only(bad_verdicts: dict[str, Verdict]) -> None:
    assert bad_verdicts["hang"] == Verdict(None, "timeout")
    assert bad_verdicts["exit"] == Verdict(None, "crash")
    assert bad_verdicts["raise"] == Verdict(None, "error: KeyError: 'no such thing'")
    for nonsense in ("nan", "text", "none", "empty dict"):
        assert bad_verdicts[nonsense] == Verdict(None, "not a number"), nonsense
    assert bad_verdicts["dict"] == Verdict({"right": 1.0, "short": 0.5})
    assert bad_verdicts["bool"] == Verdict(1.0)
    assert bad_verdicts["print"] == Verdict(0.25)


def test_a_failed_verdict_marks_its_sample() -> None:
    sample = Sample(status=Status.COMPLETED)
    Verdict(None, "error: KeyError: 'x'").apply(sample)
    assert (sample.status, sample.reward) == (Status.FAILED, None)
    assert failure_kind("error: KeyError: 'x'") == "error"
    assert failure_kind("not a number") == "not_a_number"
    kept = Sample(status=Status.TRUNCATED)
    Verdict(0.0).apply(kept)
    assert (kept.status, kept.reward) == (Status.TRUNCATED, 0.0)


def test_256_samples_are_judged_in_well_under_a_second() -> None:
    verdicts, seconds = _judge(Args(rm_type="deepscaler"), [str(n) for n in range(256)])
    assert all(verdict == Verdict(1.0) for verdict in verdicts)
    print(f"256 rewards in {seconds:.3f} s")
    assert seconds < 1.0


def test_an_answer_that_blows_up_is_cut_off() -> None:
    async def run() -> Verdict:
        pool = RewardPool(Args(rm_type="deepscaler", rm_timeout=1.0, rm_num_workers=1))
        try:
            huge = await pool.judge(Sample(label="10", response=r"</think>\boxed{10^{10^{10}}}"))
            after = await pool.judge(Sample(label="10", response=r"</think>\boxed{10}"))
            assert after == Verdict(1.0)
            return huge
        finally:
            pool.close()

    assert asyncio.run(run()).failure in ("timeout", "crash")


def test_the_sample_says_which_reward() -> None:
    async def run() -> tuple[Verdict, Verdict, Verdict]:
        pool = RewardPool(Args(rm_type="deepscaler", rm_num_workers=1))
        try:
            wrong = Sample(index=5, label="1", response="nothing")
            unknown = Sample(label="1", metadata={"rm_type": "bogus"})
            return (
                await pool.judge(wrong),
                await pool.judge(wrong, rm_type="random"),
                await pool.judge(unknown, rm_type="random"),
            )
        finally:
            pool.close()

    judged, drawn, unknown = asyncio.run(run())
    assert judged == Verdict(0.0)
    assert drawn.reward in (0.0, 1.0)
    assert unknown.failure is not None
    assert "bogus" in unknown.failure


def test_metadata_alone_may_say_which_reward() -> None:
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


def test_workers_start_with_the_first_sample_and_their_start_is_not_charged_to_it() -> None:
    async def run() -> None:
        pool = RewardPool(Args(rm_type="deepscaler", rm_num_workers=2, rm_timeout=0.2))
        try:
            assert not pool._workers
            start = time.perf_counter()
            verdict = await pool.judge(Sample(label="1", response=r"</think>\boxed{1}"))
            assert time.perf_counter() - start > 0.2  # a fresh interpreter that loads math-verify
            assert verdict == Verdict(1.0)
            assert len(pool._workers) == 2
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


def test_no_label_is_a_failure_and_not_a_zero() -> None:
    verdicts, _ = _judge(Args(rm_type="deepscaler", rm_num_workers=1), ["1"])
    assert verdicts == [Verdict(1.0)]

    async def run() -> Verdict:
        pool = RewardPool(Args(rm_type="deepscaler", rm_num_workers=1))
        try:
            return await pool.judge(Sample(response=r"</think>\boxed{1}"))
        finally:
            pool.close()

    assert "no label" in (asyncio.run(run()).failure or "")


def test_a_type_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"--rm-type dopa.*deepscaler"):
        RewardPool(Args(rm_type="dopa"))
    with pytest.raises(ValueError, match="--rm-url: not given"):
        RewardPool(Args(rm_type="boxed_remote_rm"))
    RewardPool(Args(rm_type="dopa", custom_rm_path="rewards_for_tests.coin")).close()  # nothing asks for it
    with pytest.raises(ValueError, match="--custom-rm-path"):
        RewardPool(Args(custom_rm_path="rewards_for_tests.missing"))


def test_without_a_reward_nothing_is_started_and_judging_says_so() -> None:
    pool = RewardPool(Args())
    with pytest.raises(ValueError, match="--rm-type"):
        asyncio.run(pool.judge(Sample()))
    assert not pool._workers
    pool.close()


def test_a_worker_that_cannot_start_ends_the_run_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_workers_end_with_their_owner() -> None:
    """Also one that hangs, and also where the owner is killed."""
    code = (
        "import asyncio, os, signal, sys\n"
        "from slime.config.args import Args\n"
        "from slime.core.sample import Sample\n"
        "from slime.rollout.rm_hub import RewardPool\n"
        "async def run():\n"
        "    pool = RewardPool(Args(custom_rm_path='rewards_for_tests.by_label', rm_num_workers=2))\n"
        "    await pool.judge(Sample(label='1'))\n"
        "    hang = asyncio.create_task(pool.judge(Sample(label='hang')))\n"
        "    await asyncio.sleep(0.5)\n"
        "    print(*(worker.process.pid for worker in pool._workers), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(run())\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment()).stdout
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
