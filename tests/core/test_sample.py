"""Sample: its checks, its copies, its reward, and the way through JSON."""

from __future__ import annotations

import doctest
import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from slime.core import sample as module
from slime.core.sample import PER_TOKEN, Sample, Status


def full_sample(**changes: Any) -> Sample:
    """Return a sample with every field set: a prompt of two tokens and a response of three."""
    values: dict[str, Any] = {
        "group_index": 4,
        "index": 9,
        "prompt": [{"role": "user", "content": "1 + 1"}],
        "label": "2",
        "tokens": [11, 12, 21, 22, 23],
        "prompt_length": 2,
        "response": "is 2",
        "response_length": 3,
        "loss_mask": [1, 0, 1],
        "rollout_log_probs": [-0.5, 0.0, -1.25],
        "policy_versions": [3, 3, 4],
        "routed_experts": np.arange(4 * 2 * 2, dtype=np.int16).reshape(4, 2, 2),
        "reward": {"score": 1.0, "pred": "2"},
        "reward_failure": None,
        "status": Status.COMPLETED,
        "metadata": {"level": 3, "start_rollout_id": 7},
    }
    return Sample(**(values | changes))


def test_examples_in_docstrings_hold() -> None:
    result = doctest.testmod(module)
    assert result.attempted == 7 and result.failed == 0


def test_every_field_is_set_in_these_tests() -> None:
    """A new field has to be added to `full_sample`, so that copies and JSON are tested with it."""
    made, empty = full_sample(), Sample()
    same = [f.name for f in fields(Sample) if f.compare and getattr(made, f.name) == getattr(empty, f.name)]
    assert same == ["reward_failure"]


def test_a_sound_sample_passes_the_check() -> None:
    bare = full_sample(**dict.fromkeys((*PER_TOKEN, "routed_experts")))
    for sample in (full_sample(), bare, Sample(tokens=[1, 2], prompt_length=2)):
        before = sample.to_dict()
        sample.check()
        assert sample.to_dict() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1, 2, 3, 4]}, r"sample 9: 4 tokens, but prompt_length 2 \+ response_length 3"),
        ({"prompt_length": 3}, r"5 tokens, but prompt_length 3"),
        ({"loss_mask": [1, 0]}, "loss_mask has 2 entries for 3 response tokens"),
        ({"loss_mask": []}, "loss_mask has 0 entries for 3 response tokens"),
        ({"rollout_log_probs": [0.0] * 4}, "rollout_log_probs has 4 entries for 3 response tokens"),
        ({"policy_versions": [1]}, "policy_versions has 1 entries for 3 response tokens"),
        ({"routed_experts": np.zeros((5, 2, 2), np.int32)}, r"routed_experts has shape \[5, 2, 2\] for 5 tokens"),
        ({"routed_experts": np.zeros((4, 2), np.int32)}, r"routed_experts has shape \[4, 2\] for 5 tokens"),
    ],
)
def test_fields_of_the_wrong_length_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_sample(**changes).check()


def test_a_copy_shares_nothing_that_changes() -> None:
    made = full_sample()
    copied = made.copy()
    assert copied == made and copied.routed_experts is made.routed_experts
    for name in ("tokens", *PER_TOKEN):
        getattr(copied, name).append(99)
    copied.reward["score"] = 0.0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    copied.metadata["level"] = 1
    assert made == full_sample()


@pytest.mark.parametrize(
    ("reward", "key", "value"),
    [(0.5, None, 0.5), (1, None, 1.0), (True, None, 1.0), ({"a": 2, "b": "x"}, "a", 2.0), (0.5, "unused", 0.5)],
)
def test_the_scalar_reward(reward: Any, key: str | None, value: float) -> None:
    found = full_sample(reward=reward).reward_value(key)
    assert found == value and type(found) is float


@pytest.mark.parametrize(
    ("reward", "failure", "key", "message"),
    [
        (None, None, None, r"sample 9 has no reward \(not judged yet\)"),
        (None, "timeout", "a", r"sample 9 has no reward \(timeout\)"),
        ({"a": None}, None, "a", "sample 9 has no reward"),
        ({"a": 1, "b": 2}, None, None, "a dict with the keys 'a', 'b', and --reward-key is not given"),
        ({"a": 1}, None, "b", "a dict with the keys 'a', and --reward-key is 'b'"),
        ({f"k{i}": i for i in range(11)}, None, None, r"'k9' \.\.\., and --reward-key"),
        ({f"k{i}": i for i in range(10)}, None, None, r"'k9', and --reward-key"),
        ("1", None, None, "sample 9: its reward is '1', which is not a number"),
        ({"a": [1]}, None, "a", r"the entry 'a' of its reward \(--reward-key\) is \[1\], which is not a number"),
    ],
)
def test_a_reward_without_a_number_is_refused(reward: Any, failure: str | None, key: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_sample(reward=reward, reward_failure=failure).reward_value(key)


def test_a_bare_prompt_has_nothing_generated() -> None:
    made = full_sample()
    bare = made.to_bare_prompt()
    assert bare == Sample(
        group_index=4,
        index=9,
        prompt=made.prompt,
        label="2",
        tokens=[11, 12],
        prompt_length=2,
        metadata={"level": 3},  # and not start_rollout_id: the group's generation begins again
    )
    assert bare.routed_experts is None
    bare.tokens.append(1)
    bare.metadata["new"] = 1
    assert made == full_sample()


def test_a_failed_sample_keeps_its_row_alone() -> None:
    failed = full_sample().to_failed("timeout")
    failed.check()
    assert (failed.status, failed.reward, failed.reward_failure) == (Status.FAILED, None, "timeout")
    assert (failed.group_index, failed.index, failed.tokens, failed.response_length) == (4, 9, [11, 12], 0)
    assert failed.metadata == {"level": 3, "start_rollout_id": 7}
    assert failed.loss_mask is None and failed.rollout_log_probs is None


def test_only_whole_responses_are_finished() -> None:
    finished = [status for status in Status if full_sample(status=status).is_finished]
    assert finished == [Status.COMPLETED, Status.TRUNCATED]


@pytest.mark.parametrize("made", [full_sample(), Sample(), full_sample(reward_failure="crash", status=Status.FAILED)])
def test_samples_survive_json(made: Sample) -> None:
    written = made.to_dict()
    read = Sample.from_dict(json.loads(json.dumps(written)))
    assert read == made and read.status is made.status
    if made.routed_experts is None:
        assert read.routed_experts is None
    else:
        np.testing.assert_array_equal(read.routed_experts, made.routed_experts)  # pyright: ignore[reportArgumentType]
        assert read.routed_experts is not None and read.routed_experts.dtype == np.int16
    written["tokens"].append(1)
    written["metadata"]["new"] = 1
    assert made.tokens[-1:] != [1] and "new" not in made.metadata


def test_routes_of_earlier_dumps_are_read() -> None:
    made = full_sample(routed_experts=np.arange(16, dtype=np.int32).reshape(4, 2, 2))
    written = made.to_dict()
    new = written["routed_experts"]
    read = Sample.from_dict({**written, "routed_experts": {"shape": new["shape"], "int32": new["base64"]}})
    assert made.routed_experts is not None and read.routed_experts is not None
    assert read.routed_experts.tolist() == made.routed_experts.tolist() and read.routed_experts.dtype == np.int32


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"these keys are not fields of Sample: \['rewrd'\]"):
        Sample.from_dict({**Sample().to_dict(), "rewrd": 1.0})
