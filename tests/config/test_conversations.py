"""Rows of supervised fine-tuning: errors with line numbers where nothing can be learned, and the messages' weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime.config.args import SFT_ROLLOUT, Args
from slime.config.conversations import conversation
from slime.config.data_rows import DataKeys
from slime.config.rules.data import check_rows

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def keys(label_key: str | None = None, *, loss_type: Any = "sft_loss") -> DataKeys:
    args = Args(loss_type=loss_type, rollout_function_path=SFT_ROLLOUT)
    return DataKeys.of(args, input_key="messages", label_key=label_key)


def problems(tmp_path: Path, row: dict[str, Any], data_keys: DataKeys, *, chat_template: bool = True) -> list[str]:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    found = check_rows(str(file), data_keys, chat_template=chat_template)
    assert all(problem.where == f"{file}:1" and problem.remedy for problem in found)
    return [problem.rule for problem in found]


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ("text", "'messages' is text, and there is no response"),
        ([], "'messages' is not a list of OpenAI messages"),
        ([USER, {"role": "assistant"}], "'messages': message 1, of role 'assistant', has no content"),
        ([USER], "'messages' has no message of the assistant, so there is nothing to learn"),
        ([USER, ANSWER | {"content": ""}], "'messages': message 1, of role 'assistant', is empty, so there is nothing"),
        (
            [USER, ANSWER | {"content": [{"type": "text", "text": ""}]}],
            "'messages': message 1, of role 'assistant', is",
        ),
        ([USER, ANSWER | {"weight": 0}], "'messages': every message of the assistant has weight 0"),
        (
            [USER, ANSWER | {"weight": -1}],
            "'messages': message 1, of role 'assistant', has the weight -1, which is not",
        ),
        ([USER, ANSWER | {"weight": True}], "'messages': message 1, of role 'assistant', has the weight True"),
        ([USER, ANSWER | {"weight": "1"}], "'messages': message 1, of role 'assistant', has the weight '1'"),
        ([USER | {"weight": 1}, ANSWER], "'messages': message 0, of role 'user', has a weight, but only"),
    ],
)
def test_conversations_that_are_refused_by_line(tmp_path: Path, messages: object, rule: str) -> None:
    [found] = problems(tmp_path, {"messages": messages}, keys())
    assert found.startswith(rule)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [USER, ANSWER, USER],
        [USER, ANSWER | {"weight": None}, USER | {"weight": None}, ANSWER | {"weight": 0.5}],
        [USER, ANSWER | {"content": "", "weight": 0}, USER | {"weight": 0}, ANSWER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    ],
)
def test_conversations_that_can_be_learned(tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    assert problems(tmp_path, {"messages": messages}, keys()) == []
    [rule] = problems(tmp_path, {"messages": messages}, keys(), chat_template=False)
    assert rule == "'messages' is a conversation, which the chat template renders"


def test_completions_are_checked_like_conversations(tmp_path: Path) -> None:
    of_completion = keys("completion")
    assert problems(tmp_path, {"messages": [USER], "completion": [ANSWER]}, of_completion) == []
    assert problems(tmp_path, {"messages": "a", "completion": [ANSWER]}, of_completion) == []
    assert problems(tmp_path, {"messages": [USER], "completion": "b"}, of_completion) == []
    for row, rule in (
        ({"messages": [USER], "completion": [USER]}, "'completion' has no message of the assistant"),
        ({"messages": [7], "completion": [ANSWER]}, "'messages' is not a list of OpenAI messages"),
        ({"messages": "", "completion": [ANSWER]}, "'messages' is empty"),
        ({"messages": [USER], "completion": []}, "'completion' is not a list of OpenAI messages"),
        ({"messages": [USER], "completion": None}, "'completion' is None, not text or a number"),
    ):
        [found] = problems(tmp_path, row, of_completion)
        assert found.startswith(rule)
    judged = DataKeys(input_key="messages", label_key="completion", metadata_key="metadata", tool_key=None)
    [found] = problems(tmp_path, {"messages": [USER], "completion": [ANSWER]}, judged)
    assert found.startswith("'completion' is [{'role'"), "control: a reward compares with a text"


def weights(messages: list[dict[str, Any]]) -> list[float]:
    return [message["weight"] for message in messages]


def test_the_weights_of_messages() -> None:
    talk = [USER, ANSWER, USER, ANSWER | {"weight": 0.25}, ANSWER | {"weight": None}, USER]
    assert weights(conversation(talk, None, "all_assistant")) == [0, 1, 0, 0.25, 1, 0]
    assert weights(conversation(talk, None, "last_assistant")) == [0, 0, 0, 0, 1, 0]
    assert weights(conversation([USER, ANSWER, USER], [ANSWER, USER, ANSWER], "all_assistant")) == [0, 0, 0, 1, 0, 1]
    assert weights(conversation([USER, ANSWER, USER], [ANSWER, USER, ANSWER], "last_assistant")) == [0, 0, 0, 0, 0, 1]
    assert conversation("a", [ANSWER], "all_assistant") == [USER | {"weight": 0}, ANSWER | {"weight": 1}]
    assert "weight" not in talk[0], "the row stays as the file has it"


def test_only_supervised_runs_read_conversations() -> None:
    row = {"messages": [USER, ANSWER]}
    assert keys().conversation(row) == [USER | {"weight": 0}, ANSWER | {"weight": 1}]
    assert keys(loss_type="policy_loss").conversation(row) is None
