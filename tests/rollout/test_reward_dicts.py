"""Rewards that are dicts: the entry of --reward-key is trained on, the others are kept as plain data."""

from __future__ import annotations

import asyncio
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.masking import Masker
from slime.core.sample import Sample, Status
from slime.rollout.acceptance import post_process
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.dump import read_dump, write_dump
from slime.rollout.metrics import MAX_NAMED, entry_metrics
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import Verdict, error_verdict, failure_kind, verdict_of, verdicts_of
from slime.rollout.rewards.remote import answer_verdict

SCORES = {
    "float": 1.0,
    "int": 1,
    "bool": True,
    "numpy": np.float32(1),
    "numpy bool": np.bool_(True),
    "numpy integer": np.int64(1),
    "0-d array": np.array(1.0),
    "0-d tensor": torch.tensor(1.0, dtype=torch.bfloat16),
}
NO_SCORES = {
    "text": ("1.0", "'1.0'"),
    "none": (None, "None"),
    "nan": (math.nan, "'nan'"),
    "infinite": (np.float32(-np.inf), "'-inf'"),
    "dict": ({"a": 1}, "{'a': 1}"),
    "list": ([1.0, 2.0], "[1.0, 2.0]"),
    "tensor": (torch.zeros(2), "[0.0, 0.0]"),
    "complex": (1j, "a complex"),
    "object": (object(), "a object"),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_numeric_entry_is_the_reward(name: str) -> None:
    verdict = verdict_of({"pred": "72", "score": SCORES[name]}, "score")
    assert verdict == Verdict({"pred": "72", "score": 1.0})
    assert isinstance(verdict.reward, dict)
    assert type(verdict.reward["score"]) is float


@pytest.mark.parametrize("name", NO_SCORES)
def test_an_entry_that_is_no_number_is_named(name: str) -> None:
    value, shown = NO_SCORES[name]
    failure = verdict_of({"pred": "72", "score": value}, "score").failure or ""
    assert failure.startswith("not a number: the reward dict has ")
    assert shown in failure
    assert failure.endswith("under 'score' (--reward-key)")
    assert failure_kind(failure) == "not_a_number"


def test_an_entry_that_is_missing_is_named() -> None:
    verdict = verdict_of({"pred": "72", **{f"k{number}": 0 for number in range(500)}}, "score")
    assert (verdict.failure or "").startswith("no reward key: the reward is a dict with the keys 'pred', 'k0', 'k1', ")
    assert (verdict.failure or "").endswith("'k8' and 491 more, and --reward-key is 'score'")
    assert failure_kind(verdict.failure or "") == "no_reward_key"
    assert verdict_of({}, "score") == verdict_of({}) == Verdict(None, "not a number")


def test_other_kinds_of_dicts_and_keys() -> None:
    expected = Verdict({"score": 1.0, "3": [1, 2], "(1, 2)": None})
    entries: dict[Any, Any] = {"score": 1, 3: (1, 2), (1, 2): None}
    assert verdict_of(OrderedDict(entries), "score") == expected
    assert verdict_of(MappingProxyType(entries), "score") == expected
    assert verdict_of({3: 0.5}, "3") == Verdict({"3": 0.5})
    assert verdict_of({3: 0.5, "3": 1}, "3") == Verdict(
        None, "not a number: two keys of the reward dict are both '3' as text"
    )


def test_other_data_than_plain_is_left_out() -> None:
    itself: list[Any] = []
    itself.append([itself] * 50)

    class Broken:
        def tolist(self) -> None:
            raise LookupError

    verdict = verdict_of(
        {
            "score": 0,
            "nested": {"a": [{"b": ("x", np.float32(0.5))}], 1: {2}},
            "nan": math.nan,
            "huge": 2**64,
            "object": object(),
            "itself": itself,
            "array": np.zeros((100, 200)),
            "text": "x" * 100_000,
            "half": "a\ud800b",
            "broken": Broken(),
        },
        "score",
    )
    assert verdict == Verdict(
        {
            "score": 0.0,
            "nested": {"a": [{"b": ["x", 0.5]}], "1": [2]},
            "nan": "nan",
            "huge": "(left out: a number of 65 bits)",
            "object": "(left out: a object, which is no plain data)",
            "itself": "(left out: nested more than 20 deep)",
            "array": "(left out: more than 10000 values)",
            "text": "(left out: 100002 bytes)",
            "half": "a?b",
            "broken": "(left out: a Broken, which raised a LookupError)",
        }
    )
    orjson.dumps(verdict.reward)


def test_a_huge_dict_keeps_the_reward() -> None:
    reward = verdict_of({f"k{number}": number for number in range(50_000)} | {"score": 0.5}, "score").reward
    assert isinstance(reward, dict)
    assert (len(reward), reward["score"], reward["..."]) == (1002, 0.5, "(left out: 49001 more entries)")


def test_a_dict_without_a_key_is_an_error() -> None:
    verdict = verdict_of({"score": 1.0, "pred": "72"})
    assert verdict == Verdict({"score": 1.0, "pred": "72"})
    sample = Sample(index=3, reward=verdict.reward)
    with pytest.raises(ValueError, match=r"sample 3: .*'score', 'pred', and --reward-key is not given; it must name"):
        sample.reward_value()
    with pytest.raises(ValueError, match="the keys 'score', 'pred', and --reward-key is 'acc'"):
        sample.reward_value("acc")
    with pytest.raises(ValueError, match=r"the entry 'pred' of its reward .* is '72', which is not a number"):
        sample.reward_value("pred")
    assert sample.reward_value("score") == 1


@pytest.mark.parametrize("function", ["entries", "entries_async", "entries_of_group"])
def test_dicts_come_through_the_pipe_of_a_worker(function: str) -> None:
    labels = ["plain", "no score", "text score", "odd", "large", "breaks", "plain"]
    args = Args(
        custom_rm_path=f"rewards_for_tests.{function}",
        reward_key="score",
        rm_num_workers=1,
        group_rm=function == "entries_of_group",
    )

    async def run() -> list[Sample]:
        pool = RewardPool(args)
        samples = [Sample(label=label, status=Status.COMPLETED) for label in labels]
        try:
            for sample in samples:
                if args.group_rm:
                    await pool.judge_group([sample])
                else:
                    (await pool.judge(sample)).apply(sample)
        finally:
            pool.close()
        return samples

    plain, no_score, text_score, odd, large, breaks, last = asyncio.run(run())
    assert plain.reward == last.reward == {"score": 1.0, "pred": "72", "length": 7}
    assert "--reward-key is 'score'" in (no_score.reward_failure or "")
    assert "'1.0' under 'score'" in (text_score.reward_failure or "")
    assert breaks.reward_failure == "error: ValueError: half of a pair: ?"
    assert isinstance(odd.reward, dict)
    assert [odd.reward[key] for key in ("half", "nan", "array", "3")] == ["a?b", "nan", [0, 1, 2], 4]
    assert odd.reward["huge"] == "(left out: a number of 1329 bits)"
    assert isinstance(large.reward, dict)
    assert (len(large.reward), large.reward["score"]) == (1001, 1.0)


def test_an_error_without_a_text_is_a_failure() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert error_verdict(Mute()).failure == "error: Mute: (its text raised a RuntimeError)"


def test_dicts_of_a_group_are_judged_separately() -> None:
    verdicts = verdicts_of([{"score": 1}, {"pred": "72"}, 0.5], 3, "score")
    assert [verdict.reward for verdict in verdicts] == [{"score": 1.0}, None, 0.5]
    [verdict] = verdicts_of(MappingProxyType({"score": 1}), 1, "score")
    assert verdict.failure == "error: it returned a mappingproxy for a group, not a list of rewards"


@pytest.mark.parametrize(
    ("answer", "key", "expected"),
    [
        ({"score": 1, "pred": "72"}, "score", {"score": 1.0, "pred": "72"}),
        ({"score": 1, "pred": "72"}, None, 1.0),
        ({"reward": 0.5, "acc": 1}, "acc", {"reward": 0.5, "acc": 1.0}),
        ({"reward": {"acc": 1, "pred": None}}, "acc", {"acc": 1.0, "pred": None}),
        ({"reward": 0.5, "pred": "72"}, "acc", 0.5),
        ({"pred": "72"}, "acc", None),
        (0.5, "acc", 0.5),
    ],
)
def test_a_remote_judge_may_answer_a_dict(answer: object, key: str | None, expected: object) -> None:
    verdict = answer_verdict(json.dumps(answer).encode(), Masker([]), key)
    assert verdict.reward == expected
    assert verdict.failure is None if expected is not None else "--reward-key is 'acc'" in (verdict.failure or "")


def test_secrets_are_masked_in_a_dict() -> None:
    verdict = Verdict({"score": 1.0, "url": ["http://secret-key"], "n": {"secret-key": 1}})
    masked = verdict.masked(Masker(["secret-key"]))
    assert masked.reward == {"score": 1.0, "url": ["http://***"], "n": {"***": 1}}


def test_numbers_become_means_and_texts_stay_dumped(tmp_path: Any) -> None:
    samples = [
        Sample(reward={"score": 1.0, "pred": "72", "length": 4, "right": True, "a b/c": 1}, tokens=[1]),
        Sample(reward={"score": 0.0, "pred": "7", "length": 8, "right": False, "a b/c": "?"}, tokens=[1]),
        Sample(),
    ]
    means = entry_metrics(samples, "score")
    assert means == {"reward/length": 6, "reward/right": 0.5, "reward/a_b_c": 1, "reward_share/a_b_c": 0.5}
    assert entry_metrics([Sample(reward={"x": math.nan}), Sample(reward={"x": 2})], None)["reward/x"] == 2
    assert entry_metrics([*samples, Sample(reward=0.5)], "score")["reward_share/right"] == pytest.approx(2 / 3)
    assert len(entry_metrics([Sample(reward=dict.fromkeys(map(str, range(100)), 1))], None)) == MAX_NAMED
    write_dump(tmp_path / "dump", [samples])
    assert [sample.reward for sample in read_dump(tmp_path / "dump")[0]] == [sample.reward for sample in samples]
    assert '"pred": "72"' in (tmp_path / "dump").read_text()


def test_a_copy_shares_nothing_of_a_dict() -> None:
    sample = Sample(reward={"score": 1.0, "seen": ["a"]})
    for other in (sample.copy(), Sample.from_dict(sample.to_dict())):
        assert isinstance(other.reward, dict)
        other.reward["seen"].append("b")
    assert sample.reward == {"score": 1.0, "seen": ["a"]}


def test_post_processing_keeps_the_other_entries() -> None:
    args = Args(reward_key="score", custom_reward_post_process_path="rewards_for_tests.threes")
    samples = [Sample(reward={"score": 1.0, "pred": "72"}), Sample(reward=1.0)]
    post_process(args, samples)
    assert [sample.reward for sample in samples] == [{"score": 3.0, "pred": "72"}, {"score": 3.0}]


def test_a_generate_functions_own_reward_is_checked(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": "q", "label": label} for label in ("plain", "text score", "odd")]
    args = Args(
        prompt_data=data_file(rows),
        label_key="label",
        rollout_batch_size=2,
        over_sampling_batch_size=3,
        n_samples_per_prompt=1,
        advantage_estimator="reinforce_plus_plus",
        custom_generate_function_path="rewards_for_tests.generate_and_judge",
        reward_key="score",
        deterministic=True,
    )

    async def work(context: RolloutContext) -> RolloutResult:
        return await generate_rollout(args, 0, DataBuffer(args, tokenizer), context)

    result = run_with_engines(args, work)
    assert [group[0].label for group in result.groups] == ["plain", "odd"]
    assert result.groups[0][0].reward == {"score": 1.0, "pred": "72", "length": 7}
    assert result.metrics["rollout/reward/length"] == 7
    assert result.metrics["rollout/reward_failed/not_a_number"] == 1
