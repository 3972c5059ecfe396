"""Several reward functions: the reward is their weighted sum, and each value is recorded under its function's name."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.eval_data import EvalDataset
from slime.config.parse import read
from slime.config.resolve import resolve
from slime.core.batch import from_samples
from slime.core.sample import Sample, Status
from slime.rollout.acceptance import post_process
from slime.rollout.evaluate import eval_metrics
from slime.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std
from slime.rollout.metrics import group_metrics
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import NOT_A_NUMBER, Verdict, summed
from slime.rollout.reward_trial import try_reward
from slime.rollout.sample_log import SampleLog

ROOT = Path(__file__).parents[2]
REWARDS = """
import asyncio, os
def right(args, sample): return float(sample.label in sample.response)
async def short(args, sample): return 1 - sample.response_length / 10
calls = most = 0
async def crowd(args, sample):
    global calls, most
    calls += 1
    most = max(most, calls)
    await asyncio.sleep(0.3)
    calls -= 1
    return most
def queue(args, sample): return crowd(args, sample)
def both(args, sample): return {"score": 2.0, "style": 7}
def nan(args, sample): return float("nan")
def crash(args, sample): os._exit(3)
def raises(args, sample): raise KeyError("units")
async def slow(args, sample): await asyncio.sleep(100)
def firsts(args, samples): return [float(index == 0) for index, _ in enumerate(samples)]
async def lengths(args, samples): return [sample.response_length for sample in samples]
def too_few(args, samples): return [1.0]
"""


@pytest.fixture
def args_of(tmp_path: Path) -> Callable[..., Args]:
    (tmp_path / "many.py").write_text(REWARDS)

    def make(*names: str, **flags: object) -> Args:
        paths = tuple(f"{tmp_path}/many.py:{name}" for name in names)
        values = {"custom_rm_path": paths, "reward_key": "sum", "rm_num_workers": 1, **flags}
        return Args(**values)  # pyright: ignore[reportArgumentType]

    return make


def _samples(*lengths: int) -> list[Sample]:
    return [
        Sample(
            index=index,
            group_index=0,
            label="7",
            tokens=[0] * (length + 1),
            prompt_length=1,
            response="7" * (length % 2),
            response_length=length,
            status=Status.COMPLETED,
        )
        for index, length in enumerate(lengths)
    ]


def _judged(args: Args, samples: Sequence[Sample], logs: Path | None = None) -> list[Sample]:
    async def run() -> None:
        pool = RewardPool(args, logs)
        try:
            if pool.by_group:
                await pool.judge_group(samples)
            else:
                for sample, verdict in zip(samples, await asyncio.gather(*map(pool.judge, samples)), strict=True):
                    verdict.apply(sample)
        finally:
            pool.close()

    asyncio.run(run())
    return list(samples)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs/rewards.md").read_text().partition("## Several rewards with weights")[2]
    code, words = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)[:2]
    (tmp_path / "rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    given = read([*shlex.split(words), "--rollout-max-response-len", "10", "--rm-num-workers", "1"])
    assert not given.problems
    args = resolve(Args(**given.of("slime")))
    assert args.reward_key == "sum", "filled in"
    right, wrong = _judged(args, _samples(5, 8))
    assert f"`{json.dumps(right.reward)}`" in section
    assert wrong.reward == pytest.approx({"right": 0.0, "short": 0.2, "sum": 0.02})


def test_every_reader_takes_the_sum(
    args_of: Callable[..., Args], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = args_of("right", "short", reward_weights=(1.0, -0.5))
    logs = tmp_path / "logs"
    logs.mkdir()
    samples = _judged(args, _samples(5, 5, 9), logs)
    values = [sample.reward_value(args.reward_key) for sample in samples]
    assert values == pytest.approx([0.75, 0.75, 0.95])
    metrics = group_metrics(args, [samples])
    assert metrics["rollout/reward"] == pytest.approx(sum(values) / 3)
    assert metrics["rollout/reward/right"] == 1 and metrics["rollout/reward/short"] == pytest.approx(1.1 / 3)
    assert "rollout/reward/sum" not in metrics
    assert check_reward_nonzero_std(args, samples) and not check_reward_nonzero_std(args, samples[:2])
    assert sorted(path.name for path in logs.iterdir()) == ["reward-right-0.log", "reward-short-0.log"]
    sampled = {"max_response_len": 9, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "n_samples_per_eval_prompt": 3}
    dataset = EvalDataset(name="d", path="", input_key="prompt", label_key="label", rm_type=None, **sampled)
    found = eval_metrics(args, dataset, [samples])
    assert (found["reward"], found["reward/right"]) == pytest.approx((sum(values) / 3, 1))
    post_process(replace(args, custom_reward_post_process_path="rewards_for_tests.threes"), samples)
    asyncio.run(SampleLog(tmp_path / "samples.jsonl", args, tokenizer).rollout(0, [samples]))
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert (row["reward"], row["components"], row["processed_reward"]) == (0.75, {"right": 1.0, "short": 0.5}, 3.0)
    assert from_samples(samples, args.reward_key).columns["rewards"].tolist() == [3.0] * 3


def test_plain_and_async_of_groups(args_of: Callable[..., Args]) -> None:
    args = args_of("firsts", "lengths", reward_weights=(1.0, 0.1), group_rm=True)
    first, second = _judged(args, _samples(2, 4))
    assert first.reward == pytest.approx({"firsts": 1.0, "lengths": 2.0, "sum": 1.2})
    assert second.reward == pytest.approx({"firsts": 0.0, "lengths": 4.0, "sum": 0.4})
    wrong = _judged(args_of("firsts", "too_few", group_rm=True), _samples(2, 4))
    assert [sample.reward_failure for sample in wrong] == [
        "error: in too_few: it returned 1 rewards for a group of 2"
    ] * 2


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("crash", "crash: in crash"),
        ("raises", "error: in raises: KeyError: 'units'"),
        ("slow", "timeout: in slow"),
    ],
)
def test_a_failed_part_fails_the_sample(args_of: Callable[..., Args], function: str, failure: str) -> None:
    args = args_of("right", function, rm_timeout=1.0)
    [sample] = _judged(args, _samples(5))
    assert (sample.reward, sample.reward_failure, sample.status) == (None, failure, Status.FAILED)


def test_a_dict_has_its_number_and_entries(args_of: Callable[..., Args]) -> None:
    [sample] = _judged(args_of("right", "both", reward_key="score"), _samples(5))
    assert sample.reward == {"right": 1.0, "both": 2.0, "both/style": 7, "score": 3.0}
    assert sample.reward_failure is None


def test_a_sum_that_overflows_has_failed() -> None:
    parts = {"a": Verdict(1e308), "b": Verdict(1e308)}
    assert summed(parts, [1, 1], "sum") == Verdict(None, f"{NOT_A_NUMBER}: the weighted sum is {1e308 + 1e308}")
    nan = {"a": Verdict(1.0), "b": Verdict(None, NOT_A_NUMBER)}
    assert summed(nan, [1, 0], "sum") == Verdict(None, "not a number: in b"), "also with the weight 0"
    assert summed(parts, [1, -1], "sum") == Verdict({"a": 1e308, "b": 1e308, "sum": 0.0})


def test_async_calls_wait_together(args_of: Callable[..., Args]) -> None:
    def most_at_once(name: str) -> float:
        args = args_of("right", name, reward_weights=(0.0, 1.0))
        return max(sample.reward_value("sum") for sample in _judged(args, _samples(*range(4))))

    assert most_at_once("crowd") > 1, "the plain function next to it does not take away its concurrency"
    assert most_at_once("queue") == 1, "control: a plain function that returns a coroutine"


def test_each_function_is_tried(args_of: Callable[..., Args], data_file: Callable[..., str]) -> None:
    data = {"prompt_data": data_file([{"prompt": "how many?", "label": "7"}]), "label_key": "label"}
    problems = try_reward(args_of("right", "nan", "raises", **data))
    assert [(problem.severity, problem.value.rpartition(":")[2]) for problem in problems] == [
        ("error", "nan"),
        ("warning", "raises"),
    ]
    assert try_reward(args_of("right", "short", **data)) == []
    [problem] = try_reward(args_of("right", "both", **data))
    assert "the keys 'score', 'style', and --reward-key is 'sum'" in str(problem)
