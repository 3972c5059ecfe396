"""List fields: whatever users do with `sample.tokens` works as with a list, and our own way makes no lists."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from slime.core.batch import from_samples
from slime.core.list_fields import stored
from slime.core.sample import LIST_FIELDS, Sample

LISTS: dict[str, Any] = {
    "tokens": [11, 12, 21, 22, 23],
    "loss_mask": [1, 0, 1],
    "rollout_log_probs": [-0.5, 0.0, -1e-300],
    "policy_versions": [3, 3, 4],
}
DTYPES = {"tokens": "int32", "loss_mask": "int8", "rollout_log_probs": "float64", "policy_versions": "int32"}


def compact() -> Sample:
    """Return a sample as generation leaves it, with arrays."""
    sample = Sample(group_index=0, index=7, prompt_length=2, response_length=3, reward=1.0)
    sample.set_arrays(**{name: np.array(LISTS[name], dtype=dtype) for name, dtype in DTYPES.items()})
    assert kinds(sample) == dict.fromkeys(LIST_FIELDS, np.ndarray)
    return sample


def kinds(sample: Sample) -> dict[str, type]:
    return {name: type(stored(sample, name)) for name in LIST_FIELDS}


@pytest.mark.parametrize("name", LIST_FIELDS)
def test_a_field_reads_as_an_ordinary_list(name: str) -> None:
    sample = compact()
    read = getattr(sample, name)
    assert type(read) is list and read == LISTS[name]
    assert [type(value) for value in read] == [type(value) for value in LISTS[name]]
    assert getattr(sample, name) is read, "the sample holds the list that was handed out"
    assert json.dumps(read) == json.dumps(LISTS[name])


USES: dict[str, tuple[Callable[[Sample], Any], list[int]]] = {
    "append": (lambda sample: sample.tokens.append(9), [11, 12, 21, 22, 23, 9]),
    "extend by an array": (lambda sample: sample.tokens.extend(np.array([8, 9])), [11, 12, 21, 22, 23, 8, 9]),
    "add": (lambda sample: setattr(sample, "tokens", sample.tokens.__add__([9])), [11, 12, 21, 22, 23, 9]),
    "item": (lambda sample: sample.tokens.__setitem__(0, 9), [9, 12, 21, 22, 23]),
    "slice": (lambda sample: setattr(sample, "tokens", sample.tokens[:2]), [11, 12]),
    "cut": (lambda sample: sample.tokens.__delitem__(slice(1, 4)), [11, 23]),
    "sort": (lambda sample: sample.tokens.sort(reverse=True), [23, 22, 21, 12, 11]),
    "array": (lambda sample: setattr(sample, "tokens", np.array([5, 6])), [5, 6]),
    "tensor": (lambda sample: setattr(sample, "tokens", torch.tensor([5, 6])), [5, 6]),
}


@pytest.mark.parametrize("use", USES)
def test_what_users_do_is_kept(use: str) -> None:
    change, expected = USES[use]
    sample, other = compact(), compact()
    shared = sample.copy()
    change(sample)
    assert sample.tokens == expected and sample.num_tokens == len(expected)
    assert sample.tokens_T.tolist() == expected and sample.tokens_T.dtype == np.int32
    assert shared == other, "a copy made before does not change"


def test_plus_equals_appends_in_place() -> None:
    sample = compact()
    held = sample.tokens
    sample.tokens += [9]
    assert sample.tokens is held and held == [*LISTS["tokens"], 9]
    assert sample.loss_mask is not None
    sample.loss_mask[1] = 1
    assert sample.loss_mask == [1, 1, 1] and sample.array("loss_mask").tolist() == [1, 1, 1]  # pyright: ignore


def test_other_containers_compare_and_compute_as_lists() -> None:
    sample = compact()
    assert sample.tokens == LISTS["tokens"] and sample.tokens != LISTS["tokens"][:-1]
    assert sample.tokens != tuple(LISTS["tokens"]) and 21 in sample.tokens and sample.tokens.index(22) == 3
    assert torch.tensor(sample.tokens).tolist() == LISTS["tokens"]
    assert np.array(sample.rollout_log_probs).tolist() == LISTS["rollout_log_probs"]
    assert sum(sample.loss_mask or []) == 2 and bool(sample.policy_versions)


def test_an_assigned_array_is_not_shared() -> None:
    mine = np.array([1, 2, 3], dtype=np.int32)
    sample = Sample(tokens=mine)  # pyright: ignore[reportArgumentType]
    mine[0] = 100
    assert sample.tokens == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        compact().tokens_T[0] = 1


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("tokens", [1, 2.5], "sample 7: tokens has to be a list of whole numbers: 'float' object"),
        ("tokens", [1, None], "tokens has to be a list of whole numbers: 'NoneType' object"),
        ("tokens", [1, 2**31], "tokens holds numbers that int32 cannot hold"),
        ("tokens", [1, 2**63], "tokens has to be a list of whole numbers"),
        ("rollout_log_probs", [-0.5, "x"], "rollout_log_probs has to be a list of numbers"),
        ("loss_mask", [1, [0]], "loss_mask has to be a list of numbers"),
    ],
)
def test_entries_that_are_no_numbers_are_named(name: str, values: list[Any], message: str) -> None:
    sample = compact()
    setattr(sample, name, values)
    with pytest.raises(ValueError, match=message):
        sample.array(name)


@pytest.mark.parametrize("values", [np.array([1.5]), np.zeros((2, 2), np.int64), np.array(["a"])])
def test_arrays_that_are_no_tokens_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="tokens is an array of"):
        compact().tokens = values


def test_our_own_way_makes_no_lists() -> None:
    sample = compact()
    copied = sample.copy()
    copied.check()
    written = copied.to_dict()
    assert {name: written[name] for name in LIST_FIELDS} == LISTS
    assert copied.num_sampled == 2 and copied.to_bare_prompt().tokens == [11, 12]
    batch = from_samples([sample, copied])
    assert batch.columns["tokens"].tolist() == LISTS["tokens"] * 2
    for each in (sample, copied, pickle.loads(pickle.dumps(sample)), copy.copy(sample), copy.deepcopy(sample)):
        assert kinds(each) == dict.fromkeys(LIST_FIELDS, np.ndarray)
    assert sample == copied  # this reads them
    assert kinds(sample) == dict.fromkeys(LIST_FIELDS, list), "control"


def test_lists_and_arrays_make_the_same_batch() -> None:
    lists = Sample(group_index=0, index=7, prompt_length=2, response_length=3, reward=1.0, **copy.deepcopy(LISTS))
    one, other = from_samples([lists]), from_samples([compact()])
    assert lists == compact() and lists.to_dict() == compact().to_dict() and replace(lists) == lists
    for name, values in one.columns.items():
        assert values.tobytes() == other.columns[name].tobytes() and values.dtype == other.columns[name].dtype


def test_a_text_is_known_until_something_changes() -> None:
    sample = compact()
    assert sample.known_text() is None
    sample.set_text("three words")
    assert sample.response == "three words" == sample.known_text() == sample.copy().known_text()
    edited, read, cut = sample.copy(), sample.copy(), sample.copy()
    edited.response = " three words"[1:]  # the same text, but somebody has set it
    _ = read.tokens
    cut.set_arrays(tokens=cut.tokens_T[:-1])
    assert [each.known_text() for each in (edited, read, cut)] == [None] * 3
    assert sample.known_text() == "three words"


def test_graders_of_text_get_no_tokens() -> None:
    sample = compact()
    sample.set_text("said")
    sample.routed_experts = np.zeros((4, 2, 2), np.int8)
    graded = sample.to_graded_text()
    assert (graded.tokens, graded.loss_mask, graded.rollout_log_probs, graded.routed_experts) == ([], None, None, None)
    assert (graded.response, graded.index, graded.response_length, graded.reward) == ("said", 7, 3, 1.0)
    assert len(pickle.dumps(graded)) < len(pickle.dumps(sample)) and sample.tokens == LISTS["tokens"]
