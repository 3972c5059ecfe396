"""Rollouts with real engines and a real router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.batch import from_samples
from slime.core.sample import Sample, Status
from slime.engine.protocol import GenerateRequest, SamplingParams
from slime.observability.progress import WorkProgress
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.reward_pool.pool import RewardPool
from tests.saved_state import as_json

Run = Callable[..., Any]
Write = Callable[..., str]
NONZERO_STD = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


def _args(path: str, **kwargs: Any) -> Args:
    defaults: dict[str, Any] = {
        "prompt_data": path,
        "label_key": "label",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 12,
        "rollout_max_context_len": 512,
        "custom_rm_path": "rewards_for_tests.coin",
        "rm_num_workers": 1,
    }
    return Args(**{**defaults, **kwargs})


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}", "label": str(number)} for number in range(count)]


def _account(buffer: DataBuffer, results: list[RolloutResult]) -> None:
    """Check that every group drawn was kept, dropped or is in the buffer, and that the buffer holds bare prompts."""
    kept = [group[0].group_index for result in results for group in result.groups]
    state = as_json(buffer.state_dict())
    waiting = [group[0]["group_index"] for group in state["buffer"]]
    dropped = sum(
        value
        for result in results
        for name, value in result.metrics.items()
        if name.startswith("rollout/groups_dropped/")
    )
    assert len(set(kept + waiting)) == len(kept + waiting)
    assert len(kept) + len(waiting) + dropped == state["next_group_index"]
    for group in state["buffer"]:
        for sample in group:
            assert len(sample["tokens"]) == sample["prompt_length"] > 0
            assert (sample["status"], sample["reward"], sample["metadata"]) == ("pending", None, {})


def test_looking_at_progress_changes_nothing(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(data_file(_rows(6)), rollout_temperature=0.8, custom_rm_path=None, rm_type="random")
    args = replace(args, deterministic=True)
    seen: list[WorkProgress] = []

    async def work(context: RolloutContext) -> list[RolloutResult]:
        alone = await generate_rollout(args, 3, DataBuffer(args, tokenizer), context)
        watched = asyncio.create_task(generate_rollout(args, 3, DataBuffer(args, tokenizer), context))
        while not watched.done():
            seen.append(context.progress.look())
            await asyncio.sleep(0.002)
        seen.append(context.progress.look())
        return [alone, await watched]

    alone, watched = run_with_engines(args, work)
    same, others = ([[s.tokens for s in group] for group in result.groups] for result in (alone, watched))
    assert same == others
    rollouts = [work.rollout for work in seen if work.rollout is not None]
    assert {work.rollout_id for work in seen} == {None, 3}
    assert seen[-1] == WorkProgress(), "nothing is in progress after the end"
    assert {progress.total for progress in rollouts} == {8}
    assert [progress.generated for progress in rollouts] == sorted(progress.generated for progress in rollouts)
    assert rollouts[-1].generated > 0 and rollouts[-1].tokens > 0
    assert all(progress.judged <= progress.generated <= 8 for progress in rollouts)


def test_a_rollout(run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = _args(data_file(_rows(6)), rollout_temperature=0.8, custom_rm_path=None, rm_type="random")
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> tuple[RolloutResult, float]:
        start = time.perf_counter()
        result = await generate_rollout(args, 3, buffer, context)
        return result, time.perf_counter() - start

    result, wall = run_with_engines(args, work)
    assert [group[0].group_index for group in result.groups] == [0, 1, 2, 3]
    samples = [sample for group in result.groups for sample in group]
    assert [sample.index for sample in samples] == list(range(8))
    for sample in samples:
        sample.check()
        assert tokenizer.decode(sample.prompt_tokens) == sample.prompt
        assert tokenizer.decode(sample.tokens[sample.prompt_length :]) == sample.response
        assert sample.policy_versions == [0] * sample.response_length
        assert all(log_prob < 0 for log_prob in sample.rollout_log_probs or [])
        assert sample.metadata["start_rollout_id"] == 3
        ended = sample.tokens[-1] == tokenizer.eos_token_id
        assert sample.status is (Status.COMPLETED if ended else Status.TRUNCATED)
        assert ended or sample.response_length == 12
    assert len({sample.response for sample in samples}) == 8
    metrics = result.metrics
    assert metrics["rollout/reward"] == pytest.approx(sum(s.reward_value() for s in samples) / 8)
    assert metrics["rollout/tokens"] == sum(s.response_length for s in samples)
    assert metrics["rollout/truncated"] == sum(s.status is Status.TRUNCATED for s in samples) / 8
    assert metrics["rollout/staleness"] == 0
    assert 0 < metrics["time/generation"] + metrics["time/reward"] <= wall
    assert set(from_samples(samples).columns) >= {"rollout_log_probs", "policy_versions"}
    _account(buffer, [result])


def test_dropped_groups_are_replaced_and_counted(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(data_file(_rows(50)), dynamic_sampling_filter_path=NONZERO_STD, over_sampling_batch_size=6)
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> list[RolloutResult]:
        return [await generate_rollout(args, rollout, buffer, context) for rollout in range(4)]

    results = run_with_engines(args, work)
    for result in results:
        assert len(result.groups) == 4
        for group in result.groups:
            assert len({sample.reward for sample in group}) == 2
        assert result.metrics["rollout/zero_std_groups"] == 0
        assert result.metrics["rollout/reward"] == 0.5
    dropped = sum(result.metrics.get("rollout/groups_dropped/check_reward_nonzero_std", 0) for result in results)
    assert dropped > 0
    _account(buffer, results)


@pytest.mark.parametrize(("granularity", "drawn"), [("batch", 24), ("group", 10)])
def test_refill_granularity(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast, granularity: str, drawn: int
) -> None:
    """The fourth group that is kept is number 9; waves of 8 sample 24 prompts to reach it."""
    args = _args(
        data_file(_rows(50)),
        dynamic_sampling_filter_path="rewards_for_tests.keep_every_third",
        over_sampling_batch_size=8,
        refill_granularity=granularity,
        sglang_server_concurrency=1,
        custom_generate_function_path="rewards_for_tests.generate_plain",
    )
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> RolloutResult:
        return await generate_rollout(args, 0, buffer, context)

    result = run_with_engines(args, work)
    assert [group[0].group_index % 3 for group in result.groups] == [0] * 4
    assert buffer.state_dict()["next_group_index"] <= drawn
    assert granularity == "group" or buffer.state_dict()["next_group_index"] in (16, 24)
    _account(buffer, [result])


def test_the_rest_is_aborted_and_given_back(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Responses have up to 480 tokens, so many are in flight, and many have not begun, when two groups are kept."""
    args = _args(
        data_file(_rows(30)),
        rollout_batch_size=2,
        over_sampling_batch_size=24,
        rollout_max_response_len=480,
        sglang_server_concurrency=8,
    )
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> tuple[list[RolloutResult], float]:
        results = [await generate_rollout(args, 0, buffer, context)]
        waiting = len(as_json(buffer.state_dict())["buffer"])
        start = time.perf_counter()
        request = GenerateRequest(input_ids=[9, 9], sampling_params=SamplingParams(max_new_tokens=1))
        await asyncio.gather(*(context.engines.generate(request) for _ in range(8)))
        idle = time.perf_counter() - start
        assert waiting == 22
        results.append(await generate_rollout(args, 1, buffer, context))
        return results, idle

    results, idle = run_with_engines(args, work)
    assert results[0].metrics["rollout/surplus_groups"] == 22
    assert idle < 2  # the engines are free again
    # The second round takes the first one's leftovers before new prompts.
    assert buffer.state_dict()["next_group_index"] == 26
    assert {group[0].metadata["start_rollout_id"] for group in results[1].groups} == {1}
    generated = results[0].metrics["rollout/tokens"]
    kept = sum(sample.response_length for group in results[0].groups for sample in group)
    assert generated > kept  # aborted requests had begun
    _account(buffer, results)


def test_partial_rollout_with_over_sampling_and_filters(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Over-sampling twice the batch, with a filter and a buffer filter: aborted responses continue."""
    args = _args(
        data_file(_rows(40)),
        over_sampling_batch_size=8,
        dynamic_sampling_filter_path=NONZERO_STD,
        partial_rollout=True,
        buffer_filter_path="slime.rollout.filter_hub.buffer_filters.pop_first",
        rollout_max_response_len=400,
        sglang_server_concurrency=8,
    )
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> tuple[list[RolloutResult], list[dict[str, Any]]]:
        results, states = [], []
        for rollout in range(4):
            context.policy_version = rollout
            results.append(await generate_rollout(args, rollout, buffer, context))
            states.append(as_json(buffer.state_dict()))
        return results, states

    results, states = run_with_engines(args, work)
    begun = {
        sample["index"]: sample
        for state in states[:-1]
        for group in state["buffer"]
        for sample in group
        if sample["response_length"]
    }
    kept = [sample for result in results for group in result.groups for sample in group]
    gone_on = [sample for sample in kept if sample.index in begun]
    assert gone_on, "some of what was aborted is trained on"
    for sample in kept:
        sample.check()
        assert sample.is_finished
        assert sample.reward is not None
        assert sample.response_length <= 400
    for sample in gone_on:
        before = begun[sample.index]
        length = len(before["tokens"])
        assert sample.tokens[:length] == before["tokens"]
        assert (sample.rollout_log_probs or [])[: before["response_length"]] == before["rollout_log_probs"]
        assert sample.metadata["start_rollout_id"] == before["metadata"]["start_rollout_id"]
    waiting = [group[0]["group_index"] for group in states[-1]["buffer"]]
    used = [group[0].group_index for result in results for group in result.groups]
    dropped = sum(v for r in results for k, v in r.metrics.items() if k.startswith("rollout/groups_dropped/"))
    assert len(set(used + waiting)) == len(used + waiting) == states[-1]["next_group_index"] - dropped
    # Nothing was generated twice: all tokens are in groups that were kept, dropped or are waiting.
    made = sum(result.metrics["rollout/tokens"] for result in results)
    there = sum(s.response_length for s in kept) + sum(s["response_length"] for g in states[-1]["buffer"] for s in g)
    assert there <= made
    assert dropped or there == made


def test_nothing_kept_ends_the_run(run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = _args(
        data_file(_rows(5)),
        dynamic_sampling_filter_path="rewards_for_tests.drop_all",
        max_empty_waves=3,
        deterministic=True,  # settled in order; otherwise groups of a fourth wave may end before the third wave's last
    )

    async def work(context: RolloutContext) -> None:
        await generate_rollout(args, 7, DataBuffer(args, tokenizer), context)

    with pytest.raises(RuntimeError, match=r"rollout 7: nothing was kept in 3 waves of 4 prompts.*12 by too_easy"):
        run_with_engines(args, work)


def test_failed_generation_drops_groups_and_then_the_run(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = _rows(4)
    rows[1]["label"] = rows[2]["label"] = "fails"
    args = _args(data_file(rows), custom_generate_function_path="rollout_hooks_for_tests.generate_or_fail")
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> RolloutResult:
        return await generate_rollout(args, 0, buffer, context)

    result = run_with_engines(args, work)
    assert result.metrics["rollout/groups_dropped/generation_failed"] >= 2
    assert {group[0].label for group in result.groups} == {"0", "3"}
    _account(buffer, [result])

    rows = [{**row, "label": "fails"} for row in rows]
    all_fail = _args(data_file(rows), custom_generate_function_path="rollout_hooks_for_tests.generate_or_fail")

    async def fail(context: RolloutContext) -> None:
        await generate_rollout(all_fail, 0, DataBuffer(all_fail, tokenizer), context)

    with pytest.raises(RuntimeError, match=r"generation failed for all of 4 groups.*as the label says"):
        run_with_engines(all_fail, fail)


def test_a_group_survives_failed_rewards_if_two_remain(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    def run(reward: str, **kwargs: Any) -> RolloutResult:
        args = _args(data_file(_rows(8)), custom_rm_path=f"rewards_for_tests.{reward}", **kwargs)
        buffer = DataBuffer(args, tokenizer)

        async def work(context: RolloutContext) -> RolloutResult:
            return await generate_rollout(args, 0, buffer, context)

        result = run_with_engines(args, work)
        _account(buffer, [result])
        return result

    dropped = run("fails_in_group_0")
    assert [group[0].group_index for group in dropped.groups][:3] == [1, 2, 3]
    assert dropped.metrics["rollout/groups_dropped/too_few_rewards"] == 1
    assert dropped.metrics["rollout/reward_failed/not_a_number"] == 2
    halves = run("fails_on_odd", n_samples_per_prompt=4)
    samples = [sample for group in halves.groups for sample in group]
    assert [sample.reward for sample in samples] == [1.0, None] * 8
    assert [sample.status is Status.FAILED for sample in samples] == [False, True] * 8
    assert halves.metrics["rollout/reward"] == 1.0
    assert halves.metrics["rollout/reward_failed/not_a_number"] == 8
    from_samples(samples)


def test_a_blocking_async_reward_is_ended_and_counted(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(
        data_file(_rows(8)), custom_rm_path="rewards_for_tests.blocks_in_group_0", rm_timeout=2.0, rm_num_workers=2
    )
    buffer = DataBuffer(args, tokenizer)

    async def longest_pause(seen: list[float]) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.01)
            seen.append(time.perf_counter() - start)

    async def work(context: RolloutContext) -> tuple[RolloutResult, float]:
        pauses = [0.0]
        watch = asyncio.create_task(longest_pause(pauses))
        result = await generate_rollout(args, 0, buffer, context)
        watch.cancel()
        return result, max(pauses)

    result, pause = run_with_engines(args, work)
    assert result.metrics["rollout/reward_failed/timeout"] == 2
    assert result.metrics["rollout/groups_dropped/too_few_rewards"] == 1
    assert pause < 60, "in this event loop, the reward would have blocked everything for 60 s"
    _account(buffer, [result])


@pytest.mark.parametrize("partial", [False, True])
def test_groups_are_judged_as_a_whole(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast, partial: bool
) -> None:
    args = _args(
        data_file(_rows(8)),
        custom_rm_path="rewards_for_tests.group_of_group",
        group_rm=True,
        n_samples_per_prompt=4,
        over_sampling_batch_size=6,
        partial_rollout=partial,
        sglang_server_concurrency=4,  # two groups at a time
    )
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> list[RolloutResult]:
        return [await generate_rollout(args, rollout, buffer, context) for rollout in range(2)]

    results = run_with_engines(args, work)
    groups = [group for result in results for group in result.groups]
    assert len(groups) == 8
    for group in groups:
        assert [sample.reward for sample in group] == [4.0, 4.1, 4.2, 4.3]
        assert group[0].group_index != 0
    assert results[0].metrics["rollout/groups_dropped/too_few_rewards"] == 1
    assert results[0].metrics["rollout/reward_failed/error"] == 4
    if not partial:
        _account(buffer, results)
        return
    for group in as_json(buffer.state_dict())["buffer"]:
        judged = [sample["reward"] is not None for sample in group]
        assert all(judged) or not any(judged)


def test_hooks_after_the_rollout(run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = _args(
        data_file(_rows(8)),
        custom_rm_path="rewards_for_tests.by_index",
        custom_reward_post_process_path="rewards_for_tests.double_rewards",
        rollout_sample_filter_path="rewards_for_tests.mask_first_half",
    )
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> RolloutResult:
        return await generate_rollout(args, 0, buffer, context)

    result = run_with_engines(args, work)
    samples = [sample for group in result.groups for sample in group]
    assert [sample.reward for sample in samples] == [1.0, 2.0] * 4
    assert [sample.metadata["raw_reward"] for sample in samples] == [0.5, 1.0] * 4
    assert result.metrics["rollout/reward"] == 0.75
    assert [sum(sample.loss_mask or []) > 0 for sample in samples] == [False] * 4 + [True] * 4


def test_seeds_are_each_samples_own_and_the_runs(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(data_file(_rows(4)), custom_generate_function_path="rewards_for_tests.generate_plain")

    async def work(context: RolloutContext) -> list[list[str]]:
        seeds: list[list[str]] = []
        for rollout_id, rollout_seed in ((0, 42), (0, 42), (1, 42), (0, 1)):
            own = replace(args, rollout_seed=rollout_seed)
            buffer = DataBuffer(own, tokenizer)
            result = await generate_rollout(own, rollout_id, buffer, replace(context, args=own))
            seeds.append([sample.response for group in result.groups for sample in group])
        return seeds

    first, again, later, other = run_with_engines(args, work)
    assert len(set(first)) == 8
    assert first == again
    assert not set(first) & set(later)
    assert not set(first) & set(other)


def test_a_wrong_reward_key_ends_the_run(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "q", "label": "dict"}] * 4
    args = _args(data_file(rows), custom_rm_path="rewards_for_tests.by_label", reward_key="wrong")
    buffer = DataBuffer(args, tokenizer)

    async def work(context: RolloutContext) -> None:
        await generate_rollout(args, 0, buffer, context)

    with pytest.raises(ValueError, match="--reward-key is 'wrong'"):
        run_with_engines(args, work)


def test_cancelling_a_rollout_ends_its_requests(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(data_file(_rows(8)), rollout_max_response_len=480)

    async def work(context: RolloutContext) -> int:
        task = asyncio.create_task(generate_rollout(args, 0, DataBuffer(args, tokenizer), context))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    assert run_with_engines(args, work) == 1  # the test's own hook


def test_a_rollout_without_engines_is_a_clear_error(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = _args(data_file(_rows(4)))
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    with pytest.raises(ValueError, match="--rollout-num-gpus"):
        asyncio.run(generate_rollout(args, 0, DataBuffer(args, tokenizer), context))


def test_requests_that_do_not_end_end_the_run(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.rollout.group._ABORT_TIMEOUT", 0.5)
    args = _args(
        data_file(_rows(4)),
        rollout_batch_size=2,
        over_sampling_batch_size=4,
        engine_health_timeout=0.1,
        custom_generate_function_path="rewards_for_tests.generate_deaf",
    )

    async def work(context: RolloutContext) -> None:
        await generate_rollout(args, 0, DataBuffer(args, tokenizer), context)

    with pytest.raises(RuntimeError, match=r"4 requests are still running 0\.6 s after"):
        run_with_engines(args, work)


def test_errors_of_a_generate_function_end_the_run(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = _args(data_file(_rows(4)), custom_generate_function_path="rewards_for_tests.generate_broken")

    async def work(context: RolloutContext) -> None:
        await generate_rollout(args, 0, DataBuffer(args, tokenizer), context)

    with pytest.raises(
        RuntimeError, match=r"more than --max-generation-failures 0\.5 allows; .*LookupError: a mistake"
    ):
        run_with_engines(args, work)


def test_a_data_source_that_runs_dry_is_named(
    run_with_engines: Run, data_file: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Dry(DataBuffer):
        def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
            return super().get_groups(num - 1, rollout_id=rollout_id)

    args = _args(data_file(_rows(4)))

    async def work(context: RolloutContext) -> None:
        await generate_rollout(args, 0, Dry(args, tokenizer), context)

    with pytest.raises(ValueError, match=r"--data-source-path.*gave 3 groups.*lacks 4"):
        run_with_engines(args, work)
