"""Groups in flight are saved as drawn, except for finished samples; `test_data_side` tests this with random actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.in_flight import TrackedSource
from tests.saved_state import as_lists, through_a_file

Write = Callable[..., str]


@pytest.fixture
def make(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> Callable[[], TrackedSource]:
    path = data_file([{"prompt": f"q{number}", "metadata": {"seen": []}} for number in range(6)])
    args = Args(prompt_data=path, n_samples_per_prompt=2)
    return lambda: TrackedSource(DataBuffer(args, tokenizer))


def _saved(source: TrackedSource) -> dict[str, Any]:
    return as_lists(through_a_file(source.state_dict()))


def _indices(groups: list[list[Sample]]) -> list[int]:
    return [group[0].group_index for group in groups]


def _finished(sample: Sample) -> Sample:
    sample = sample.copy()
    sample.tokens, sample.response_length = [*sample.tokens, 9], 1
    sample.rollout_log_probs, sample.policy_versions = [-1.0], [3]
    sample.status, sample.reward = Status.COMPLETED, 1.0
    return sample


def test_a_restored_run_draws_the_same_groups_again(make: Callable[[], TrackedSource]) -> None:
    source = make()
    first = source.get_groups(2, rollout_id=0)
    second = source.get_groups(3, rollout_id=1)
    source.forget(0)
    source.add_groups([[sample.to_bare_prompt() for sample in second[1]]])
    again = make()
    again.load_state_dict(_saved(source))
    assert (_indices(first), _indices(second)) == ([0, 1], [2, 3, 4])
    assert _indices(again.get_groups(1, rollout_id=1)) == [2]
    once_more = make()
    once_more.load_state_dict(_saved(again))  # one of two restored groups is in flight again, the other one waits
    for restored in (again, once_more):
        left = [4] if restored is again else [2, 4]
        assert _indices(restored.get_groups(len(left) + 2, rollout_id=1)) == [*left, 3, 5]
        restored.forget(1)
        assert (restored.num_in_flight, _saved(restored)["in_flight"]) == (0, [])


def test_only_finished_samples_are_saved_with_tokens(make: Callable[[], TrackedSource]) -> None:
    source = make()
    [group] = source.get_groups(1, rollout_id=0)
    drawn = group[1].to_dict()
    # In progress, in place: one of several turns has ended, and its tool is at work.
    group[1].tokens.append(9)
    group[1].response_length, group[1].status = 1, Status.COMPLETED
    group[1].metadata["seen"].append("a turn")
    group[0] = _finished(group[0])
    [[finished, unfinished]] = _saved(source)["in_flight"]
    assert (finished["status"], finished["reward"], finished["policy_versions"]) == ("completed", 1.0, [3])
    assert unfinished == {**drawn, "metadata": {"seen": []}}
    [as_drawn] = as_lists(source.state_dict(as_drawn=True))["in_flight"]
    assert [sample["response_length"] for sample in as_drawn] == [0, 0]
    assert as_drawn[1] == unfinished
    group.clear()
    [restored] = _saved(source)["in_flight"]
    assert [sample["response_length"] for sample in restored] == [0, 0]


def test_groups_are_identified_by_their_number(make: Callable[[], TrackedSource]) -> None:
    """Groups that are given back may be other objects, in another order, and some may never have been drawn."""
    source = make()
    groups = source.get_groups(3, rollout_id=0)
    groups[1].clear()
    stranger = [Sample(group_index=77, index=154, tokens=[9], prompt_length=1)]
    source.add_groups([stranger, [s.copy() for s in groups[2]], [s.copy() for s in groups[0]]])
    assert [group[0]["group_index"] for group in _saved(source)["in_flight"]] == [1]
    assert _indices(source.get_groups(3, rollout_id=1)) == [77, 2, 0]


def test_a_users_groups_may_share_one_number() -> None:
    """Such groups are removed in the order in which they were drawn, and each is removed once."""

    class Unnumbered(DataBuffer):
        def __init__(self) -> None:
            self.given_back: list[list[Sample]] = []

        def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
            return [[Sample(index=rollout_id * 10 + number)] for number in range(num)]

        def add_groups(self, groups: Sequence[list[Sample]]) -> None:
            self.given_back += groups

        def state_dict(self) -> dict[str, Any]:
            return {}

    source = TrackedSource(Unnumbered())
    first, second = source.get_groups(2, rollout_id=0), source.get_groups(2, rollout_id=1)
    source.add_groups([second[1]])
    assert [sample["index"] for [sample] in _saved(source)["in_flight"]] == [1, 10, 11]
    source.forget(0)
    assert [sample["index"] for [sample] in _saved(source)["in_flight"]] == [10, 11]
    source.add_groups([*first, *second])
    assert source.num_in_flight == 0


def test_a_group_may_have_a_single_sample(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    args = Args(prompt_data=data_file([{"prompt": "q"}] * 3), n_samples_per_prompt=1)
    source = TrackedSource(DataBuffer(args, tokenizer))
    groups = source.get_groups(2, rollout_id=0)
    source.add_groups([groups[0]])
    assert [sample["index"] for [sample] in _saved(source)["in_flight"]] == [1]


def test_the_sources_own_methods_can_be_called(make: Callable[[], TrackedSource]) -> None:
    source = make()
    source.get_groups(1, rollout_id=0)
    assert source.num_prompts == 6
    with pytest.raises(AttributeError):
        source.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        source._cursor  # noqa: B018
