"""A custom generate function that fails costs its sample; engines and aborts are not its failures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import failing_hooks_for_tests as hooks
import numpy as np
import pytest
from scripted_engine import ScriptedEngine
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.batch import from_samples
from slime.core.sample import Sample, Status
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.evaluate import Evaluator
from slime.rollout.reward_pool.pool import RewardPool

Write = Callable[..., str]


def run_args(write: Write, function: str, **flags: Any) -> Args:
    defaults: dict[str, Any] = {
        "prompt_data": write([{"prompt": f"question {number}"} for number in range(9)]),
        "rollout_batch_size": 2,
        "n_samples_per_prompt": 8,
        "rollout_max_response_len": 10,
        "deterministic": True,
        "custom_generate_function_path": f"failing_hooks_for_tests.{function}",
    }
    return Args(**{**defaults, **flags})


def rollout(
    args: Args, tokenizer: PreTrainedTokenizerFast, meanwhile: Callable[[ScriptedEngine], Any] | None = None
) -> RolloutResult:
    async def main() -> RolloutResult:
        engine = ScriptedEngine()
        context = RolloutContext(args, engine, tokenizer, RewardPool(args))  # pyright: ignore[reportArgumentType]
        task = asyncio.create_task(generate_rollout(args, 0, DataBuffer(args, tokenizer), context))
        if meanwhile is not None:
            await meanwhile(engine)
        return await task

    return asyncio.run(main())


def test_a_failing_function_costs_its_sample(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        result = rollout(run_args(data_file, "fail_on_odd"), tokenizer)
    samples = [sample for group in result.groups for sample in group]
    failed = [sample for sample in samples if sample.status is Status.FAILED]
    assert [sample.index for sample in failed] == list(range(1, 16, 2))
    assert result.metrics["rollout/generation_failed"] == 8
    assert not [name for name in result.metrics if "reward_failed" in name]
    assert all(sample.prompt_length == len(sample.tokens) > 0 for sample in failed), "as drawn, not as spoilt"
    texts = {str(sample.reward_failure) for sample in failed}
    for part in (
        "NotFoundError: no such tool (",
        "SystemExit: the tool has",
        "CancelledError",
        "ValueError: sample 7: 0 tokens",
    ):
        assert [text for text in texts if part in text], part
    assert all(text.startswith("generate function failed: --custom-generate-function-path failing_h") for text in texts)
    # Each of the four kinds has one entry, with its whole traceback, though it happened twice.
    errors = [record for record in caplog.records if record.name == "slime.rollout.group"]
    assert len(errors) == 4
    assert all(record.exc_info is not None for record in errors)
    assert "rollout 0, sample 1 failed: NotFoundError" in errors[0].getMessage()
    rewards_N = from_samples(samples).columns["rewards"]
    assert np.isnan(rewards_N).tolist() == [False, True] * 8, "out of baseline and loss, like a failed reward"


def test_too_many_failures_end_the_run(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = run_args(data_file, "fail_on_odd", max_generation_failures=0.4)
    with pytest.raises(
        RuntimeError, match=r"8 of 16 samples were not generated, .*failures 0\.4 allows; the last: gen"
    ):
        rollout(args, tokenizer)


@pytest.mark.parametrize(
    ("function", "cause"),
    [("fail_plainly", "the function raised StopIteration"), ("return_nothing", "it returned a NoneType")],
)
def test_if_all_fail_the_cause_is_named(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, function: str, cause: str
) -> None:
    with pytest.raises(RuntimeError, match=f"allows; the last: .*{cause}"):
        rollout(run_args(data_file, function), tokenizer)
    with pytest.raises(RuntimeError, match=f"generation failed for all of 2 groups, the last error: .*{cause}"):
        rollout(run_args(data_file, function, max_generation_failures=1.0), tokenizer)


def test_groups_of_one_left_are_dropped(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = run_args(data_file, "fail_on_odd", n_samples_per_prompt=2, max_generation_failures=1.0, max_empty_waves=2)
    with pytest.raises(
        RuntimeError, match=r"nothing was kept in 2 waves of 2 prompts .* dropped: 4 by too_few_rewards"
    ):
        rollout(args, tokenizer)


def test_lost_engines_are_not_its_failures(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = run_args(data_file, "misreport_a_lost_engine", max_generation_failures=0.0)
    with pytest.raises(RuntimeError, match=r"generation failed for all of 2 groups, the last error: .*it is gone"):
        rollout(args, tokenizer)


def test_aborted_turns_are_not_its_failures(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """A weight update cuts off the first turn of every sample: the function raises, and is called again."""
    args = run_args(data_file, "require_a_whole_turn", rollout_batch_size=1, max_generation_failures=0.0)
    hooks.CALLED_WITH.clear()

    async def update_once(engine: ScriptedEngine) -> None:
        while len(engine.in_flight) < 8:
            await asyncio.sleep(0)
        engine.advance(0, 1)
        await engine.update_weights()
        while len(hooks.CALLED_WITH) < 16:
            await asyncio.sleep(0.01)
        while engine.in_flight:
            engine.advance(0, 10)

    result = rollout(args, tokenizer, update_once)
    assert "rollout/generation_failed" not in result.metrics
    assert [sample.status is not Status.FAILED for sample in result.groups[0]] == [True] * 8
    again = hooks.CALLED_WITH[8:]
    assert [status for _, status, _ in again] == [Status.ABORTED] * 8
    assert sum(length for _, _, length in again) == 1, "the token that came before the update is kept"


def test_evaluation_counts_them_as_failed(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_file([{"prompt": f"question {number}"} for number in range(4)], "eval.jsonl")
    sampling: dict[str, Any] = {"eval_temperature": 1.0, "eval_top_p": 1.0, "eval_top_k": -1}
    sampling |= {"eval_max_response_len": 10, "eval_input_key": "prompt", "n_samples_per_eval_prompt": 2}
    args = run_args(data_file, "fail_on_odd", eval_prompt_data=("few", data), **sampling)

    async def main() -> dict[str, float]:
        context = RolloutContext(args, ScriptedEngine(), tokenizer, RewardPool(args))  # pyright: ignore[reportArgumentType]
        return await Evaluator(args, tokenizer).run(0, context)

    metrics = asyncio.run(main())
    assert metrics["eval/few/failed"] == 0.5
    assert "evaluation on few, sample 1 failed: NotFoundError" in caplog.text


def test_the_share_is_of_ended_samples() -> None:
    from slime.rollout.sample_failures import SampleFailures

    failures = SampleFailures(Args(rollout_batch_size=1, n_samples_per_prompt=4, max_generation_failures=0.5), 0)
    failed = Sample(status=Status.FAILED, reward_failure="generate function failed: KeyError: 'x'")
    lost = Sample(status=Status.FAILED, reward_failure="generation failed: http://engine")
    failures.count([failed, failed, lost, lost])
    with pytest.raises(RuntimeError, match=r"rollout 0: 3 of 3 samples were not generated, .*KeyError: 'x'; correct"):
        failures.count([failed])
    with pytest.raises(RuntimeError, match="1 of 1 judged samples have no reward"):
        other = SampleFailures(Args(rollout_batch_size=1, n_samples_per_prompt=1, max_generation_failures=0.5), 0)
        other.count([Sample(status=Status.FAILED, reward_failure="timeout")])
