from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rollout_hooks_for_tests as hooks
from scripted_engine import ScriptedEngine
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.eval_data import EvalDataset
from slime.core.sample import Sample, Status
from slime.rollout.context import RolloutContext
from slime.rollout.evaluate import Evaluator, eval_metrics, pass_at_k
from slime.rollout.reward_pool.pool import RewardPool

DATASET = EvalDataset(
    name="d",
    path="",
    input_key="prompt",
    label_key="label",
    rm_type="deepscaler",
    n_samples_per_eval_prompt=4,
    max_response_len=8,
    temperature=1.0,
    top_p=0.7,
    top_k=-1,
)


@pytest.mark.parametrize(("num_samples", "num_correct"), [(6, 0), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_equals_the_share_of_draws(num_samples: int, num_correct: int) -> None:
    outcomes = [1] * num_correct + [0] * (num_samples - num_correct)
    for k in range(1, num_samples + 1):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def _group(rewards: list[float | None], response: str = r"a</think>\boxed{1}") -> list[Sample]:
    return [
        Sample(
            reward=reward,
            response=response,
            response_length=length + 1,
            status=Status.FAILED if reward is None else Status.COMPLETED,
            reward_failure="timeout" if reward is None else None,
        )
        for length, reward in enumerate(rewards)
    ]


def test_metrics_of_a_data_set() -> None:
    groups = [_group([1, 0, 0, 0]), _group([1, 1, 1, None]), _group([0, 0, 0, 0], response=r"\boxed{1}")]
    metrics = eval_metrics(Args(), DATASET, groups)
    means = [0.25, 0.75, 0.0]
    assert metrics["reward"] == pytest.approx(statistics.fmean(means))
    assert metrics["reward_stderr"] == pytest.approx(statistics.stdev(means) / 3**0.5)
    assert metrics["reward_judged"] == pytest.approx(statistics.fmean([0.25, 1.0, 0.0]))
    assert metrics["format"] == pytest.approx(7 / 11)
    assert metrics["failed"] == pytest.approx(1 / 12)
    assert metrics["num_prompts"] == 3
    assert metrics["response_length"] == pytest.approx((10 + 6 + 10) / 11)
    assert metrics["pass@1"] == pytest.approx(statistics.fmean(means))
    assert metrics["pass@2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["pass@4"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["pass@2_stderr"] == pytest.approx(statistics.stdev([0.5, 1, 0]) / 3**0.5)
    one = eval_metrics(Args(), replace(DATASET, n_samples_per_eval_prompt=1), [_group([1])])
    assert not any(name.startswith("pass@") for name in one)
    assert "reward_stderr" not in one, "one prompt gives no standard error"


def test_failed_responses_may_be_excluded_from_evaluation() -> None:
    groups = [_group([1, 0, 0, 0]), _group([1, 1, 1, None]), _group([0, 0, 0, 0])]
    metrics = eval_metrics(Args(), replace(DATASET, failed_as="excluded"), groups)
    assert metrics["reward"] == metrics["reward_judged"] == pytest.approx(statistics.fmean([0.25, 1.0, 0.0]))
    assert metrics["pass@4"] == pytest.approx((1 + 0) / 2)  # a prompt with three judged responses does not count
    assert metrics["failed"] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("rm_type", "rewards", "expected"),
    [
        ("math", [1, None, None], 1 / 3),
        ("boxed_math", [1, None, None], 1 / 3),
        ("f1", [0.5, None], 0.25),
        ("dapo", [1, None, None], -1 / 3),  # also if no wrong answer shows the scale
        ("boxed_dapo", [1, None], 0),
        ("remote_rm", [1, None, None], 1 / 3),
        ("remote_rm", [0.5, 0.25, None], 0.25),
        ("remote_rm", [1, -1, None, None], -0.5),
        ("remote_rm", [0.5, -0.5, None], -1 / 3),
        ("remote_rm", [7, -2, None], 2.5),  # unknown: left out
        ("remote_rm", [1.5, None], 1.5),
        (None, [1, None], 0.5),
    ],
)
def test_a_failed_response_has_the_lowest_reward(
    rm_type: str | None, rewards: list[float | None], expected: float, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = eval_metrics(Args(), replace(DATASET, rm_type=rm_type), [_group(rewards)])
    judged = [reward for reward in rewards if reward is not None]
    assert metrics["reward"] == pytest.approx(expected)
    assert metrics["reward_judged"] == pytest.approx(statistics.fmean(judged))
    left_out = [record.message for record in caplog.records if "left out" in record.message]
    assert bool(left_out) == (max(judged) > 1)
    assert all(f"rewards from {min(judged):g} to {max(judged):g}" in message for message in left_out)


def test_a_failed_line_uses_its_own_judges_scale() -> None:
    group = _group([1, None])
    group[1].metadata = {"rm_type": "dapo"}
    assert eval_metrics(Args(), DATASET, [group])["reward"] == 0
    assert eval_metrics(Args(custom_rm_path="a.b"), DATASET, [group])["reward"] == 0.5, "which nobody asks then"


def test_a_failed_reward_dict_uses_its_own_scale() -> None:
    group = _group([None, None, None])
    group[0].reward, group[1].reward = {"score": -1.0, "length": 90.0}, {"score": 1.0, "length": 70.0}
    metrics = eval_metrics(Args(reward_key="score", custom_rm_path="a.b"), DATASET, [group])
    assert metrics["reward"] == pytest.approx(-1 / 3)
    assert metrics["pass@2"] == pytest.approx(2 / 3)


def test_an_evaluation_without_successes_has_no_reward(caplog: pytest.LogCaptureFixture) -> None:
    metrics = eval_metrics(Args(), DATASET, [_group([None, None])])
    assert metrics == {"num_prompts": 1, "failed": 1}
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.message == "evaluation on d: none of 2 responses was judged, so it has no reward; the first: timeout"


def test_format_is_reported_only_with_deepscaler() -> None:
    def names(dataset: EvalDataset, *, args: Args | None = None, rm_type: str | None = None) -> set[str]:
        group = _group([1, 0, 0, 0])
        for sample in group[1:]:
            sample.metadata = {} if rm_type is None else {"rm_type": rm_type}
        return set(eval_metrics(args or Args(), dataset, [group]))

    assert "format" in names(DATASET)
    assert "format" in names(DATASET, rm_type="deepscaler")
    assert "format" in names(replace(DATASET, rm_type=None), args=Args(rm_type="deepscaler"))
    assert "format" not in names(replace(DATASET, rm_type="random"))
    assert "format" not in names(DATASET, rm_type="random")
    assert "format" not in names(DATASET, args=Args(custom_rm_path="rewards_for_tests.coin"))
    assert "format" not in names(replace(DATASET, rm_type=None))


@pytest.mark.parametrize("other", [0.5, 2.0, -1.0])
def test_pass_at_k_requires_binary_rewards(other: float) -> None:
    def pass_names(rewards: list[float | None]) -> list[str]:
        return [name for name in eval_metrics(Args(), DATASET, [_group(rewards)]) if name.startswith("pass@")]

    assert pass_names([1, 0, None, 0]) == ["pass@1", "pass@2", "pass@4"]
    assert pass_names([1, 0, None, other]) == []


def test_pass_at_k_works_with_negative_rewards() -> None:
    groups = [_group([1, -1, -1, -1]), _group([-1, -1, -1, -1])]
    metrics = eval_metrics(Args(), DATASET, groups)
    assert metrics["reward"] == -0.75
    assert (metrics["pass@1"], metrics["pass@4"]) == (0.125, 0.5)
    mixed = eval_metrics(Args(), DATASET, [*groups, _group([0, 0, 0, 0])])
    assert not any(name.startswith("pass@") for name in mixed)


def eval_args(path: str, **flags: Any) -> Args:
    """Return the flags of an evaluation on one file, which samples from the policy's whole distribution."""
    sampling = {"eval_temperature": 1.0, "eval_top_p": 1.0, "eval_top_k": -1}
    data = {"eval_prompt_data": (path,), "eval_input_key": "prompt", "eval_label_key": "label"}
    return Args(**{**data, **sampling, **flags})


def test_responses_have_numbers_and_seeds(
    data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "q", "label": label} for label in ("1", "2", "abort")]
    args = eval_args(
        data_file(rows),
        n_samples_per_eval_prompt=3,
        eval_max_response_len=4,
        custom_generate_function_path="rollout_hooks_for_tests.number",
    )
    hooks.CALLS.clear()
    client: Any = ScriptedEngine()
    context = RolloutContext(args, client, tokenizer, RewardPool(args))
    metrics = asyncio.run(Evaluator(args, tokenizer).run(4, context))
    calls: list[Any] = [call for _, call in hooks.CALLS]
    assert [call[:2] for call in calls if call[0] < 2] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    seeds = {index: {call[2] for call in calls if call[1] == index} for index in range(9)}
    assert [len(found) for found in seeds.values()] == [1] * 9 and len(set.union(*seeds.values())) == 9
    assert Counter(index for _, index, _ in calls if index > 5) == {6: 100, 7: 100, 8: 100}
    assert metrics["eval/data/reward_judged"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["eval/data/failed"] == pytest.approx(1 / 3)
    assert "the first: aborted by the engine, 100 times" in caplog.text


def test_two_data_sets_at_once(
    run_with_engines: Callable[..., Any],
    data_file: Callable[..., str],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [{"prompt": f"q{number}", "label": "1", "answer": "2"} for number in range(5)]
    first, second = data_file(rows, "first.jsonl"), data_file(rows, "second.jsonl")
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"datasets:\n- {{name: b, path: '{second}@[:2]', rm_type: deepscaler, label_key: answer, "
        "n_samples_per_eval_prompt: 2, max_response_len: 3}\n"
    )
    args = Args(
        eval_prompt_data=("a", first),
        eval_config=str(config),
        n_samples_per_eval_prompt=1,
        eval_input_key="prompt",
        eval_label_key="label",
        eval_rm_type="random",
        eval_max_response_len=6,
        eval_temperature=1.0,
        eval_top_p=0.7,
        eval_top_k=-1,
        rm_num_workers=1,
    )

    async def work(context: RolloutContext) -> list[dict[str, float]]:
        evaluator = Evaluator(args, context.tokenizer)
        return [await evaluator.run(rollout, context) for rollout in (0, 0, 1)]

    first_result, again, later = run_with_engines(args, work)
    assert first_result["eval/a/num_prompts"] == 5
    assert first_result["eval/b/num_prompts"] == 2
    assert first_result["eval/a/response_length_max"] <= 6
    assert first_result["eval/b/response_length_max"] <= 3
    assert first_result["eval/b/reward"] == 0
    assert "eval/b/pass@2" in first_result
    assert {name for name in first_result if name.endswith("/format")} == {"eval/b/format"}
    assert "eval/a/pass@2" not in first_result
    # `random` uses a sample's number: evaluation numbers samples by itself, whatever came before.
    assert first_result["eval/a/reward"] == again["eval/a/reward"] == later["eval/a/reward"]


def test_greedy_evaluation_repeats_itself(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = data_file([{"prompt": f"q{number}", "label": "1"} for number in range(4)])

    args = eval_args(
        path,
        eval_max_response_len=200,
        eval_temperature=0.0,
        custom_rm_path="rewards_for_tests.coin",
        rm_num_workers=1,
    )

    async def work(context: RolloutContext) -> list[float]:
        lengths: list[float] = []
        for temperature, rollout_id in ((0.0, 0), (0.0, 5), (1.0, 0), (1.0, 5)):
            own = replace(args, eval_temperature=temperature)
            metrics = await Evaluator(own, context.tokenizer).run(rollout_id, replace(context, args=own))
            lengths.append(metrics["eval/data/response_length"])
        return lengths

    greedy, greedy_again, drawn, drawn_again = run_with_engines(args, work)
    assert greedy == greedy_again
    assert drawn != drawn_again


def test_groups_are_the_responses_to_one_prompt(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    args = eval_args(
        data_file([{"prompt": f"q{number}", "label": "1"} for number in range(3)]),
        n_samples_per_eval_prompt=2,
        eval_max_response_len=4,
        custom_rm_path="rewards_for_tests.group_of_group",
        group_rm=True,
        rm_num_workers=1,
    )

    async def work(context: RolloutContext) -> dict[str, float]:
        return await Evaluator(args, context.tokenizer).run(0, context)

    metrics = run_with_engines(args, work)
    assert metrics["eval/data/reward"] == pytest.approx(2.05)  # the failed group is left out: its scale is unknown
    assert metrics["eval/data/failed"] == pytest.approx(1 / 3)  # group 0


def test_an_evaluation_without_judge_has_no_reward(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    args = eval_args(
        data_file([{"prompt": f"q{number}", "label": "raise"} for number in range(3)]),
        eval_max_response_len=4,
        custom_rm_path="rewards_for_tests.by_label",
        rm_num_workers=1,
    )

    async def work(context: RolloutContext) -> dict[str, float]:
        return await Evaluator(args, context.tokenizer).run(0, context)

    metrics = run_with_engines(args, work)
    assert metrics.pop("eval/data/time") > 0
    assert metrics == {"eval/data/num_prompts": 3, "eval/data/failed": 1}


def test_aborts_of_a_rollout_cost_no_response(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A response continues where it was aborted, and ends as it would have without the abort."""
    args = eval_args(
        data_file([{"prompt": f"q{number}", "label": "1"} for number in range(4)]),
        eval_max_response_len=300,
        custom_rm_path="rewards_for_tests.coin",
        rm_num_workers=1,
    )

    async def work(context: RolloutContext) -> tuple[dict[str, float], dict[str, float], int]:
        async def disturbed() -> tuple[dict[str, float], int]:
            evaluation = asyncio.ensure_future(evaluator.run(0, context))
            aborts = 0
            while not evaluation.done():
                await asyncio.sleep(0.02)
                await context.engines.abort_all()
                aborts += 1
            return evaluation.result(), aborts

        evaluator = Evaluator(args, context.tokenizer)
        undisturbed = await evaluator.run(0, context)
        return (undisturbed, *await disturbed())

    undisturbed, disturbed, aborts = run_with_engines(args, work)
    assert aborts > 3
    assert disturbed["eval/data/failed"] == 0
    names = ("reward", "response_length", "response_length_max", "truncated")
    assert [disturbed[f"eval/data/{name}"] for name in names] == [undisturbed[f"eval/data/{name}"] for name in names]


def test_each_set_has_its_own_form_of_prompts(
    data_file: Callable[..., str], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = data_file([{"question": [{"role": "user", "content": "1+1?"}]}])
    config = tmp_path / "eval.yaml"
    args = Args(eval_config=str(config), eval_input_key="prompt")
    entry = f"name: a, path: {path}, input_key: question"
    config.write_text(f"datasets: [{{{entry}, apply_chat_template: true}}]")
    Evaluator(args, tokenizer)
    config.write_text(f"datasets: [{{{entry}, apply_chat_template: false}}]")
    with pytest.raises(ValueError, match="'question' is not text; for OpenAI messages, add --apply-chat-template"):
        Evaluator(args, tokenizer)
