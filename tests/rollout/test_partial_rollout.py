"""Responses that are made in several parts, by several policies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_engine import END, ScriptedEngine, check_drawn, draw
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.core.sample_columns import from_columns
from slime.engine.client import EngineClient
from slime.engine.protocol import SamplingParams
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.generate import generate_sample, sampling_seed
from slime.rollout.reward_pool.pool import RewardPool
from tests.forked_engine import ForkedEngine

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.rollout.group._FRUITLESS_PAUSE", 0)


def _args(path: str, **kwargs: Any) -> Args:
    defaults: dict[str, Any] = {
        "prompt_data": path,
        "rollout_batch_size": 1,
        "over_sampling_batch_size": 3,
        "n_samples_per_prompt": 2,
        "rollout_max_response_len": 10,
        "partial_rollout": True,
        "custom_generate_function_path": "scripted_engine.generate_and_judge",
        "custom_rm_path": "rewards_for_tests.coin",
    }
    return Args(**{**defaults, **kwargs})


def _prompts(write: Write) -> str:
    return write([{"prompt": f"question {number}"} for number in range(9)])


class Rollouts:
    """One rollout after another against a scripted engine."""

    def __init__(self, args: Args, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = args
        self.engine = ScriptedEngine()
        self.buffer = DataBuffer(args, tokenizer)
        self.context = RolloutContext(args, self.engine, tokenizer, RewardPool(args), 1)  # pyright: ignore[reportArgumentType]

    async def start(self, rollout_id: int) -> asyncio.Task[RolloutResult]:
        task = asyncio.create_task(generate_rollout(self.args, rollout_id, self.buffer, self.context))
        await settle()
        return task

    async def update(self) -> None:
        await self.engine.update_weights()
        self.context.policy_version = self.engine.version
        await settle()

    def advance_sample(self, index: int, num_tokens: int) -> None:
        """Advance the request of one sample, found by its seed; one that has ended is left alone."""
        seeds = [sampling_seed(self.args.rollout_seed, rollout, index) for rollout in range(9)]
        for place, asked in enumerate(self.engine.in_flight):
            if asked.request.sampling_params.sampling_seed in seeds:
                self.engine.advance(place, num_tokens)
                return

    def advance_group(self, index: int, num_tokens: int) -> None:
        for member in (2 * index, 2 * index + 1):
            self.advance_sample(member, num_tokens)

    def waiting(self) -> dict[int, list[Sample]]:
        groups = from_columns(self.buffer.state_dict()["buffer"])
        return {group[0].group_index: group for group in groups}


async def settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


def test_leftover_groups_continue_with_their_tokens(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """One of three groups is kept; the others come again with tokens, and the finished one with its reward."""
    rollouts = Rollouts(_args(_prompts(data_file)), tokenizer)

    async def main() -> tuple[list[RolloutResult], dict[int, list[Sample]], int]:
        task = await rollouts.start(0)
        rollouts.advance_group(1, 2)
        rollouts.advance_sample(4, 10)  # the first sample of group 2
        rollouts.advance_group(0, 10)
        results, waiting = [await task], rollouts.waiting()
        await rollouts.update()
        requests = rollouts.engine.num_requests
        task = await rollouts.start(1)
        again = rollouts.engine.num_requests - requests
        rollouts.advance_group(1, 10)
        results.append(await task)
        return results, waiting, again

    results, waiting, again = asyncio.run(main())
    assert list(waiting) == [1, 2]
    lengths = [sample.response_length for sample in waiting[1]]
    assert all(0 < length <= 2 for length in lengths)
    finished, untouched = waiting[2]
    assert (finished.is_finished, untouched.response_length) == (True, 0)
    assert finished.reward is not None
    assert results[0].metrics["rollout/surplus_groups"] == results[0].metrics["rollout/partial_groups"] == 2
    assert not [name for name in results[0].metrics if name.startswith("rollout/groups_dropped/")]
    [group] = results[1].groups
    assert group[0].group_index == 1
    for sample, length in zip(group, lengths, strict=True):
        check_drawn(rollouts.args, sample)
        assert sample.metadata["start_rollout_id"] == 0
        whole = sample.response_length - length
        assert sample.policy_versions == [1] * length + [2] * whole
        assert sample.response == tokenizer.decode(sample.tokens[sample.prompt_length :])
    unfinished = sum(not sample.is_finished for sample in [*waiting[1], *waiting[2]])
    assert again == unfinished + 2  # and one new group; no finished sample gets another request
    versions = [version for sample in group for version in sample.policy_versions or []]
    metrics = results[1].metrics
    assert metrics["rollout/offpolicy_tokens"] == versions.count(1) / len(versions)
    assert metrics["rollout/staleness_max"] == 1


def test_a_weight_update_only_interrupts_a_response(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """This holds without --partial-rollout, too; the first abort arrives before any token."""
    rollouts = Rollouts(_args(_prompts(data_file), partial_rollout=False, over_sampling_batch_size=1), tokenizer)

    async def main() -> RolloutResult:
        task = await rollouts.start(0)
        await rollouts.update()
        rollouts.advance_group(0, 1)
        await settle()
        await rollouts.update()
        rollouts.advance_group(0, 10)
        return await task

    result = asyncio.run(main())
    for sample in result.groups[0]:
        check_drawn(rollouts.args, sample)
        assert sample.policy_versions == [2] + [3] * (sample.response_length - 1)
    assert result.metrics["rollout/surplus_groups"] == 0


def test_engines_that_only_abort_fail_a_sample(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.rollout.group._MAX_FRUITLESS", 5)
    rollouts = Rollouts(_args(_prompts(data_file)), tokenizer)

    async def main() -> None:
        task = await rollouts.start(0)
        while not task.done():
            await rollouts.engine.abort_all()
            await settle()
        await task

    with pytest.raises(RuntimeError, match="generation failed for all of 3 groups"):
        asyncio.run(main())


@pytest.mark.parametrize(("most", "num_rollouts"), [(3, 3), (1, 8)])
def test_parts_are_cut_by_token_count(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, most: int, num_rollouts: int
) -> None:
    """Each sample gets a limited number of tokens; unfinished ones wait, unless the batch cannot be filled.

    With one token in each part, every response that ends has its end exactly at a cut.
    """
    args = _args(_prompts(data_file), partial_rollout_max_tokens=most, over_sampling_batch_size=4)
    rollouts = Rollouts(args, tokenizer)

    async def main() -> list[RolloutResult]:
        results = []
        for rollout_id in range(num_rollouts):
            task = await rollouts.start(rollout_id)
            while not task.done():
                for asked in rollouts.engine.in_flight:
                    assert asked.request.sampling_params.max_new_tokens <= most
                rollouts.engine.advance(0, 10)
                await settle()
            results.append(await task)
            await rollouts.update()
        return results

    results = asyncio.run(main())
    samples = [sample for result in results for group in result.groups for sample in group]
    assert max(sample.response_length for sample in samples) > most
    for sample in samples:
        check_drawn(args, sample)
        assert sample.is_finished
    assert sum(result.metrics["rollout/partial_groups"] for result in results) > 0


def test_a_group_with_stale_tokens_starts_again(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rollouts = Rollouts(_args(_prompts(data_file), max_staleness=1, over_sampling_batch_size=2), tokenizer)

    async def main() -> list[float]:
        task = await rollouts.start(0)
        rollouts.advance_group(1, 1)
        rollouts.advance_group(0, 10)
        restarted = [(await task).metrics["rollout/restarted_groups"]]
        for rollout_id, updates in ((1, 1), (2, 1)):
            for _ in range(updates):
                await rollouts.update()
            task = await rollouts.start(rollout_id)
            rollouts.advance_group(rollout_id + 1, 10)  # a new group is faster again
            restarted.append((await task).metrics["rollout/restarted_groups"])
        return restarted

    restarted = asyncio.run(main())
    assert restarted == [0, 0, 1]
    [group] = rollouts.waiting().values()
    assert [sample.response_length for sample in group] == [0, 0]
    assert "start_rollout_id" not in group[0].metadata


def test_limits_apply_to_the_whole_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """Response and context limits count existing tokens; if nothing is left, no request is made."""
    engine = ScriptedEngine()

    async def rest(args: Args, begun: int, prompt: int = 4) -> tuple[Sample, int | None]:
        sample = Sample(index=0, tokens=[30] * (prompt + begun), prompt_length=prompt, response_length=begun)
        sample.rollout_log_probs, sample.policy_versions = [-1.0] * begun, [0] * begun
        sample.loss_mask, sample.status = [0] * begun, Status.ABORTED
        context = RolloutContext(args, engine, tokenizer, RewardPool(args))  # pyright: ignore[reportArgumentType]
        params = SamplingParams(max_new_tokens=args.rollout_max_response_len, sampling_seed=5)
        task = asyncio.create_task(generate_sample(args, sample, params, context))
        await settle()
        asked = [waiting.request.sampling_params.max_new_tokens for waiting in engine.in_flight]
        if asked:
            await engine.abort_all()
        await task
        return sample, asked[0] if asked else None

    def run(args: Args, begun: int) -> tuple[Sample, int | None]:
        return asyncio.run(rest(args, begun))

    args = Args(rollout_max_response_len=10)
    assert [run(args, begun)[1] for begun in (0, 7, 9, 10)] == [10, 3, 1, None]
    short = Args(rollout_max_response_len=10, rollout_max_context_len=9)
    assert [run(short, begun)[1] for begun in (0, 4, 5)] == [5, 1, None]
    assert run(args, 10)[0].status is run(short, 5)[0].status is Status.TRUNCATED
    assert run(args, 3)[0].loss_mask == [0] * 3


def test_a_stop_text_may_cross_two_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    """An engine sees only its own part; "ab" is found if one part ends in "a" and the next begins with "b"."""
    engine = ScriptedEngine()
    args = Args(rollout_max_response_len=10)
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])

    async def go_on(last: int, *stops: str) -> Sample:
        sample = Sample(tokens=[30, 31, last], prompt_length=1, response_length=2, status=Status.ABORTED)
        sample.rollout_log_probs, sample.policy_versions = [-1.0] * 2, [1] * 2
        context = RolloutContext(args, engine, tokenizer, RewardPool(args))  # pyright: ignore[reportArgumentType]
        params = SamplingParams(max_new_tokens=10, sampling_seed=5, stop=stops)
        task = asyncio.create_task(generate_sample(args, sample, params, context))
        await settle()
        engine.in_flight[0].tokens += [b, a, 40]
        engine.in_flight[0].log_probs += [-2.0, -3.0, -4.0]
        engine.in_flight[0].end("length", 1)
        return await task

    stopped = asyncio.run(go_on(a, "ab"))
    assert (stopped.tokens[-2:], stopped.status) == ([a, b], Status.COMPLETED)
    assert stopped.rollout_log_probs == [-1.0, -1.0, -2.0]
    before = tokenizer.decode([31])  # ended a part by itself: another turn begins after it
    for last, *stops in ((40, "ab"), (a, "aba!"), (a, "zb"), (a, before, "a long stop text")):
        assert asyncio.run(go_on(last, *stops)).response_length == 5


def test_the_scripted_engine_ends_its_responses() -> None:
    """Control of the control: the tests above contain ends, and responses that reach their limit."""
    lengths = [next((place for place in range(10) if draw(seed, place, 1)[0] == END), 10) for seed in range(50)]
    assert 0 in lengths
    assert 10 in lengths


# --- against an engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_weights(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Glm4ForCausalLM

    model = Glm4ForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    path = tmp_path_factory.mktemp("other")
    model.save_pretrained(path)
    return path


def hf_log_probs(path: Path, sample: Sample, temperature: float) -> torch.Tensor:
    """Return [response] log-probs of Hugging Face's model with the weights at `path`."""
    from transformers import Glm4ForCausalLM

    tokens = torch.tensor([sample.tokens])
    with torch.no_grad():
        logits = Glm4ForCausalLM.from_pretrained(path)(tokens).logits[0, sample.prompt_length - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, tokens[0, sample.prompt_length :, None])[:, 0]


def test_three_parts_by_two_policies(
    model_dir: Path, other_weights: Path, data_file: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Each token has the log-prob that Hugging Face gives it with the policy that sampled it."""
    args = _args(_prompts(data_file), n_samples_per_prompt=4, rollout_engine="embedded", hf_checkpoint=str(model_dir))
    engine = ForkedEngine(model_dir, log_path=tmp_path / "engine.log")

    async def main() -> list[Sample]:
        async with EngineClient(engine.url, engines=[engine.url], request_timeout=60) as client:
            context = RolloutContext(args, client, tokenizer, RewardPool(args))
            [samples] = DataBuffer(args, tokenizer).get_groups(1, rollout_id=0)
            for version, weights in enumerate((model_dir, other_weights, model_dir)):
                if version:
                    await client.flush_cache()
                    await client.update_weights_from_disk(str(weights), str(version))
                params = SamplingParams(max_new_tokens=6 * (version + 1), temperature=0.8)
                for sample in samples:
                    if sample.status is not Status.COMPLETED:
                        await generate_sample(args, sample, replace(params, sampling_seed=sample.index), context)
            return samples

    try:
        engine.wait_ready(120)
        samples = asyncio.run(main())
    finally:
        engine.stop()
    whole = [sample for sample in samples if sample.response_length == 18]
    assert whole, "some response has all three parts"
    for sample in whole:
        sample.check()
        assert sample.policy_versions == [0] * 6 + [1] * 6 + [2] * 6
        found = torch.tensor(sample.rollout_log_probs)
        first, second = (hf_log_probs(path, sample, 0.8) for path in (model_dir, other_weights))
        expected = torch.cat([first[:6], second[6:12], first[12:]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (found[6:12] - first[6:12]).abs().max() > 0.05  # control: the other policy gives other log-probs
