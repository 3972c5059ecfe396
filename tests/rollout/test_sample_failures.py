"""How many samples a rollout accepts whose reward or whose custom generate function failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.sample_failures import SampleFailures


def group(*failures: str | None) -> list[Sample]:
    return [
        Sample(
            reward=1.0 if failure is None else None,
            reward_failure=failure,
            status=Status.COMPLETED if failure is None else Status.FAILED,
        )
        for failure in failures
    ]


ERROR = "error: KeyError: 'answer'"


def test_the_share_counts_at_least_a_batch() -> None:
    failures = SampleFailures(Args(rollout_batch_size=4, n_samples_per_prompt=2, max_reward_failures=0.5), 3)
    failures.count(group("timeout", ERROR))  # two of two, but four of eight may fail
    failures.count(group("timeout", "crash"))
    message = (
        r"^rollout 3: 5 of 6 judged samples have no reward, more than --max-reward-failures 0\.5 allows: "
        r"2 by timeout, 2 by error, 1 by crash \(the last: error: KeyError: 'answer'\); .*--rm-timeout"
    )
    with pytest.raises(RuntimeError, match=message):
        failures.count(group(ERROR, None))


def test_beyond_a_batch_all_judged_samples_count() -> None:
    failures = SampleFailures(Args(rollout_batch_size=1, n_samples_per_prompt=4, max_reward_failures=0.5), 0)
    for _ in range(10):
        failures.count(group("timeout", "crash", None, None))
    with pytest.raises(RuntimeError, match="21 of 41"):
        failures.count(group("timeout"))


def test_unjudged_samples_do_not_count() -> None:
    failures = SampleFailures(Args(rollout_batch_size=2, n_samples_per_prompt=2, max_reward_failures=0.0), 0)
    failures.count(group("generation failed: http://engine did not answer", None))
    failures.count([Sample(status=Status.ABORTED)])
    with pytest.raises(RuntimeError, match="1 of 3 judged samples"):
        failures.count(group("memory", None))


def test_a_share_of_one_never_ends_a_run() -> None:
    every, most = (
        SampleFailures(Args(rollout_batch_size=1, n_samples_per_prompt=2, max_reward_failures=share), 0)
        for share in (1.0, 0.99)
    )
    for _ in range(20):
        every.count(group("timeout", "timeout"))
        with pytest.raises(RuntimeError, match=r"more than --max-reward-failures 0\.99 allows"):
            most.count(group("timeout", "timeout"))


@pytest.mark.parametrize(("share", "ends"), [(0.4, True), (0.6, False)])
def test_a_rollout_in_which_every_second_reward_fails(
    share: float,
    ends: bool,
    run_with_engines: Callable[..., Any],
    data_file: Callable[..., str],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    args = Args(
        prompt_data=data_file([{"prompt": f"q{number}"} for number in range(8)]),
        rollout_batch_size=4,
        n_samples_per_prompt=4,
        over_sampling_batch_size=4,
        rollout_max_response_len=4,
        custom_rm_path="rewards_for_tests.fails_on_odd",
        rm_num_workers=1,
        max_reward_failures=share,
    )

    async def work(context: RolloutContext) -> RolloutResult:
        return await generate_rollout(args, 0, DataBuffer(args, tokenizer), context)

    if ends:
        with pytest.raises(RuntimeError, match=r"--max-reward-failures 0\.4 allows: \d+ by not_a_number"):
            run_with_engines(args, work)
    else:
        assert run_with_engines(args, work).metrics["rollout/reward_failed/not_a_number"] == 8
