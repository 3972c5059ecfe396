from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.config.data_rows import DataKeys
from slime.core.sample import Sample
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.filter_hub.buffer_filters import pop_first
from slime.rollout.prompts import PromptSet, load_prompts
from tests.saved_state import as_json, through_a_file

Write = Callable[..., str]


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{number}", "label": str(number)} for number in range(count)]


def _args(path: str, **kwargs: Any) -> Args:
    return Args(**{"prompt_data": path, "label_key": "label", "n_samples_per_prompt": 2, **kwargs})


def _labels(groups: list[list[Sample]]) -> list[int]:
    return [int(group[0].label or "") for group in groups]


def test_groups_are_numbered_and_tokenised(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    buffer = DataBuffer(_args(data_file(_rows(3))), tokenizer)
    groups = buffer.get_groups(2, rollout_id=0) + buffer.get_groups(2, rollout_id=1)
    assert [[(s.group_index, s.index) for s in group] for group in groups] == [
        [(0, 0), (0, 1)],
        [(1, 2), (1, 3)],
        [(2, 4), (2, 5)],
        [(3, 6), (3, 7)],
    ]
    assert _labels(groups) == [0, 1, 2, 0]
    assert buffer.mean_prompt_tokens == 2
    sample = groups[1][0]
    assert tokenizer.decode(sample.tokens) == "q1"
    assert sample.prompt_length == len(sample.tokens) == 2
    sample.metadata["mine"] = 1
    sample.tokens.append(9)
    assert groups[1][1].metadata == {}
    assert len(groups[1][1].tokens) == 2


def test_messages_get_no_additional_special_tokens(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "1+1=?"}]
    row = {"prompt": messages, "label": 2, "metadata": {"level": [1]}, "tools": [{"name": "f"}], "more": 1}
    path = data_file([row])
    buffer = DataBuffer(_args(path, apply_chat_template=True, tool_key="tools"), tokenizer)
    sample = buffer.get_groups(1, rollout_id=0)[0][0]
    assert tokenizer.decode(sample.tokens) == "[gMASK]<sop><|user|>\n1+1=?tools:1<|assistant|>\n<think>"
    assert sample.tokens[0] == tokenizer.convert_tokens_to_ids("[gMASK]")
    assert (sample.prompt, sample.label, sample.metadata) == (messages, "2", {"level": [1]})


def test_the_seed_decides_each_epochs_permutation(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = data_file(_rows(20))

    def epochs(**kwargs: Any) -> list[list[int]]:
        buffer = DataBuffer(_args(path, **kwargs), tokenizer)
        drawn = _labels(buffer.get_groups(7, rollout_id=0) + buffer.get_groups(53, rollout_id=1))
        return [drawn[:20], drawn[20:40], drawn[40:]]

    shuffled = epochs(rollout_shuffle=True, rollout_seed=1)
    assert [sorted(epoch) for epoch in shuffled] == [list(range(20))] * 3
    assert shuffled == epochs(rollout_shuffle=True, rollout_seed=1)
    assert shuffled[0] != shuffled[1] != list(range(20))
    assert shuffled != epochs(rollout_shuffle=True, rollout_seed=2)
    assert epochs() == [list(range(20))] * 3
    # The order must stay the same over versions, because a resumed run has to find it again.
    assert shuffled[0][:5] == [10, 7, 9, 4, 6]


def test_weights_decide_how_often_rows_come(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    """They hold over epochs and a resume, prompts that are too long do not count, and other weights are refused."""
    short, long = data_file(_rows(4)), data_file([*_rows(10)[4:], {"prompt": "q" * 99, "label": "99"}], "long.jsonl")
    words = {"prompt_data": (short, long), "prompt_data_weights": (2.0, 0.5), "rollout_max_context_len": 20}
    args = _args("", **words, rollout_shuffle=True)
    buffer = DataBuffer(args, tokenizer)
    assert buffer.num_prompts == 2 * 4 + 6 // 2
    first = buffer.get_groups(15, rollout_id=0)
    again = DataBuffer(args, tokenizer)
    again.load_state_dict(through_a_file(buffer.state_dict()))
    rest = buffer.get_groups(7, rollout_id=1)
    assert _labels(again.get_groups(7, rollout_id=1)) == _labels(rest)
    counts = Counter(_labels(first + rest))  # two epochs
    assert counts == {**dict.fromkeys(range(4), 4), **dict.fromkeys(range(4, 10), 1)}
    assert len(set(_labels(first)[:11]) - set(range(4))) == 3
    for other in ({"prompt_data_weights": (2.0, 1.0)}, {"prompt_data_weights": ()}):
        with pytest.raises(ValueError, match=r"--prompt-data-weights: .* then, .* now"):
            DataBuffer(replace(args, **other), tokenizer).load_state_dict(buffer.state_dict())


def test_slices(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = data_file(_rows(10))

    def labels(part: str) -> list[int]:
        buffer = DataBuffer(_args(path + part), tokenizer)
        return _labels(buffer.get_groups(buffer.num_prompts, rollout_id=0))

    assert labels("@[2:4]") == [2, 3]
    assert labels("@[:2]") == [0, 1]
    assert labels("@[8:]") == [8, 9]
    with pytest.raises(ValueError, match="no prompt"):
        labels("@[5:5]")


def test_parquet_gives_the_prompts_of_jsonl(
    data_file: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Optional keys that a parquet struct fills with null are not rendered as "None", in messages and in tools."""
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": f"{number}?"}], "label": number, "metadata": {"level": number}}
        for number in range(5)
    ]
    rows[1]["prompt"].append({"role": "user", "content": "more", "name": "x"})
    rows[2]["tools"] = [{"name": "f"}]
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_struct_array(pyarrow.array(rows)), path)

    def load(file: str, **kwargs: Any) -> PromptSet:
        args = _args(file, apply_chat_template=True, tool_key="tools", **kwargs)
        keys = DataKeys.of(args, input_key="prompt", label_key="label")
        return load_prompts(file, args, tokenizer, keys, longest=None)

    for part in ("", "@[-3:-1]"):
        of_jsonl, of_parquet = load(data_file(rows) + part), load(f"{path}{part}")
        assert of_jsonl.prompts == of_parquet.prompts
        assert {type(prompt.label) for prompt in of_parquet.prompts} == {str}
    assert "None" not in tokenizer.decode(of_parquet.prompts[0].tokens)
    state = DataBuffer(_args(str(path), apply_chat_template=True), tokenizer).state_dict()
    assert through_a_file(state) is not state
    with pytest.raises(ValueError, match=r"data\.parquet: no column 'text'; it has prompt, label, metadata"):
        DataBuffer(_args(str(path), input_key="text"), tokenizer)


def test_prompts_without_room_are_counted_and_named(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "x" * length, "label": length} for length in (5, 9, 8, 500, 30, 6)]
    buffer = DataBuffer(_args(data_file(rows), rollout_max_context_len=9), tokenizer)
    assert _labels(buffer.get_groups(3, rollout_id=0)) == [5, 8, 6]
    assert buffer.num_prompts == 3
    assert "3 of 6 prompts left out" in caplog.text
    assert "lines or rows 2, 4, 5" in caplog.text
    with pytest.raises(ValueError, match="no prompt"):
        DataBuffer(_args(data_file(rows), rollout_max_context_len=5), tokenizer)


@pytest.mark.parametrize(
    ("row", "kwargs", "message"),
    [
        ('{"prompt": "a", "label"', {}, "not JSON"),
        ("[1, 2]", {}, "not a JSON object"),
        ({"label": "1"}, {}, "no key 'prompt'; it has label"),
        ({"prompt": "a"}, {}, "no key 'label'; it has prompt"),
        ({"prompt": "a", "label": [1]}, {}, "'label' is .*text or a number"),
        ({"prompt": 5, "label": "1"}, {}, "'prompt' is not text"),
        ({"prompt": [{"role": "user", "content": "a"}], "label": "1"}, {}, "--apply-chat-template"),
        ({"prompt": "", "label": "1"}, {}, "'prompt' is empty"),
        ({"prompt": "a", "label": "1", "metadata": [1]}, {}, r"'metadata' is '\[1\]', not an object"),
        ({"prompt": 5, "label": "1"}, {"apply_chat_template": True}, "list of OpenAI messages"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "label": "1", "tools": [1]},
            {"apply_chat_template": True, "tool_key": "tools"},
            "the chat template fails on it",
        ),
        ({"prompt": [{"content": "a"}], "label": "1"}, {"apply_chat_template": True}, "'role'"),
    ],
)
def test_a_bad_line_is_named(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, row: Any, kwargs: dict[str, Any], message: str
) -> None:
    good = {"prompt": [{"role": "user", "content": "a"}] if kwargs else "a", "label": "1"}
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{message}"):
        DataBuffer(_args(data_file([good, "", row]), **kwargs), tokenizer)
    assert DataBuffer(_args(data_file([good, "", good]), **kwargs), tokenizer).num_prompts == 2


def test_files_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl.*cannot be read"):
        DataBuffer(_args(str(tmp_path / "missing.jsonl")), tokenizer)
    with pytest.raises(ValueError, match=r"data\.csv: \.csv is not a known type of data file.*\.parquet"):
        DataBuffer(_args(str(tmp_path / "data.csv")), tokenizer)
    with pytest.raises(ValueError, match="--prompt-data"):
        DataBuffer(Args(), tokenizer)


def test_pop_first_removes_the_oldest_groups_in_place() -> None:
    buffer = [[Sample(group_index=number)] for number in range(3)]
    taken = pop_first(Args(), 4, buffer, 2)
    assert [group[0].group_index for group in taken] == [0, 1]
    assert [group[0].group_index for group in buffer] == [2]
    assert len(pop_first(Args(), 4, buffer, 2)) == 1
    assert buffer == []


def test_buffer_filter_hook(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    path = data_file(_rows(6))
    buffer = DataBuffer(_args(path, buffer_filter_path="rewards_for_tests.pop_last"), tokenizer)
    groups = buffer.get_groups(3, rollout_id=0)
    groups[2][0].metadata["seen"] = 7
    buffer.add_groups(groups)
    assert _labels(buffer.get_groups(2, rollout_id=7)) == [0, 1]  # the filter gets the real rollout id
    assert _labels(buffer.get_groups(2, rollout_id=8)) == [2, 3]
    greedy = DataBuffer(_args(path, buffer_filter_path="rewards_for_tests.pop_too_many"), tokenizer)
    greedy.add_groups(greedy.get_groups(1, rollout_id=0))
    with pytest.raises(ValueError, match=r"--buffer-filter-path.*returned 5 groups"):
        greedy.get_groups(1, rollout_id=0)
    copying = DataBuffer(_args(path, buffer_filter_path="rewards_for_tests.pop_nothing"), tokenizer)
    copying.add_groups(copying.get_groups(1, rollout_id=0))
    with pytest.raises(ValueError, match=r"--buffer-filter-path.*trained on twice; it has to take out"):
        copying.get_groups(1, rollout_id=0)


def test_changed_data_or_order_is_noticed_on_resume(data_file: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _rows(4)
    state = DataBuffer(_args(data_file(rows)), tokenizer).state_dict()
    DataBuffer(_args(data_file(rows, "moved.jsonl")), tokenizer).load_state_dict(state)
    rows[2]["label"] = "7"
    with pytest.raises(ValueError, match=r"changed\.jsonl.*sha256"):
        DataBuffer(_args(data_file(rows, "changed.jsonl")), tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match="sha256"):  # the same file, read in another way
        DataBuffer(_args(data_file(_rows(4)), input_key="label"), tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match="--rollout-seed: 42 then, 1 now"):
        DataBuffer(_args(data_file(_rows(4)), rollout_seed=1), tokenizer).load_state_dict(state)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), st.integers(0, 7)),
        st.tuples(st.just("give back"), st.integers(0, 7)),
        st.tuples(st.just("restore"), st.just(0)),
    ),
    max_size=30,
)


def _run(buffer_class: type[DataBuffer], args: Args, tokenizer: Any, operations: list[tuple[str, int]]) -> None:
    """After any draws, returns, saves and restores, held and buffered groups are each epoch's prompts exactly once."""
    buffer = buffer_class(args, tokenizer)
    held: list[list[Sample]] = []
    for operation, count in operations:
        if operation == "get":
            drawn = buffer.get_groups(count, rollout_id=0)
            assert len(drawn) == count
            held += drawn
        elif operation == "give back":
            buffer.add_groups([[sample.to_bare_prompt() for sample in group] for group in held[:count]])
            del held[:count]
        else:
            state = through_a_file(buffer.state_dict())
            buffer = buffer_class(args, tokenizer)
            buffer.load_state_dict(state)
    held += buffer.get_groups(len(as_json(buffer.state_dict())["buffer"]), rollout_id=0)
    held.sort(key=lambda group: group[0].group_index)
    assert [group[0].group_index for group in held] == list(range(len(held)))
    assert [sample.index for group in held for sample in group] == list(range(2 * len(held)))
    labels = _labels(held)
    for start in range(0, len(labels), buffer.num_prompts):
        epoch = labels[start : start + buffer.num_prompts]
        assert max(Counter(epoch).values()) == 1
        assert len(epoch) < buffer.num_prompts or sorted(epoch) == list(range(buffer.num_prompts))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, shuffle=st.booleans())
def test_operations_neither_lose_nor_repeat_a_prompt(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, operations: list[tuple[str, int]], shuffle: bool
) -> None:
    _run(DataBuffer, _args(data_file(_rows(5)), rollout_shuffle=shuffle), tokenizer, operations)


@pytest.mark.parametrize("forgotten", ["buffer", "cursor", "epoch", "next_index"])
def test_a_buffer_that_forgets_state_is_noticed(
    data_file: Write, tokenizer: PreTrainedTokenizerFast, forgotten: str
) -> None:
    class Forgetful(DataBuffer):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict({**state, forgotten: [] if forgotten == "buffer" else 0})

    args = _args(data_file(_rows(5)), rollout_shuffle=True)
    operations = [("get", 7), ("give back", 2), ("restore", 0), ("get", 7)]
    _run(DataBuffer, args, tokenizer, operations)
    with pytest.raises(AssertionError):
        _run(Forgetful, args, tokenizer, operations)
