"""OpenAI messages that are accepted, and errors with line numbers for all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime.config.data_rows import DataKeys
from slime.config.messages import messages_fault, plain_messages
from slime.config.rules.data import check_rows

USER = {"role": "user", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
GENERAL = "'prompt' is not a list of OpenAI messages ({'role': ..., 'content': ...})"


@pytest.mark.parametrize(
    ("messages", "contents"),
    [
        ([USER], ["a"]),
        ([{"role": "system", "content": ""}, USER], ["", "a"]),
        ([USER, {"role": "assistant", "content": "b"}], ["a", "b"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], ["ab"]),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "1"}],
         ["a", "", "1"]),
        ([USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}], ["a", "", "1"]),
        ([USER, {"role": "assistant", "content": "b", "tool_calls": None}, USER], ["a", "b", "a"]),
        ([USER, {"role": "observation", "content": "1"}], ["a", "1"]),
    ],
)  # fmt: skip
def test_messages_that_are_handled(messages: list[dict[str, Any]], contents: list[str]) -> None:
    before = json.dumps(messages)
    assert messages_fault(messages, "prompt") is None
    plain = plain_messages(messages)
    assert [message["content"] for message in plain] == contents
    assert [message["role"] for message in plain] == [message["role"] for message in messages]
    assert json.dumps(messages) == before, "the row stays as the file has it"


def _user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: object, calls: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": calls}


TEXT = {"type": "text", "text": "a"}
FIRST = "'prompt': message 0, of role 'user', has "
SECOND = "'prompt': message 1, of role 'assistant', has "
NO_TURN = "'prompt': the last message is the assistant's and calls a tool"


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ("", "'prompt' is empty"),
        (7, GENERAL),
        ([], GENERAL),
        (_user("a"), GENERAL),
        ([USER, "text"], f"{GENERAL}: message 1 is 'text'"),
        ([USER, None], f"{GENERAL}: message 1 is null"),
        ([{"content": "a"}], f"{GENERAL}: message 0 has no role"),
        ([{"role": None, "content": "a"}], f"{GENERAL}: message 0 has the role null"),
        ([{"role": 7, "content": "a"}], f"{GENERAL}: message 0 has the role 7"),
        ([{"role": " ", "content": "a"}], f"{GENERAL}: message 0 has the role ' '"),
        ([{"role": ["user"], "content": "a"}], f"{GENERAL}: message 0 has the role ['user']"),
        ([USER, {"role": "assistant", "content": None}], f"{SECOND}content null"),
        ([{"role": "user"}], f"{FIRST}no content"),
        ([_user(None) | {"tool_calls": []}], f"{FIRST}content null"),
        ([_user(7)], f"{FIRST}the content 7, which is neither text nor a list of parts"),
        ([_user({"text": "a"})], f"{FIRST}the content {{'text': 'a'}}, which is neither"),
        ([_user([])], f"{FIRST}the content [], which has no parts"),
        (
            [_user([TEXT, {"type": "image_url"}])],
            f"{FIRST}a part 1 that is of type 'image_url'; the models read",
        ),
        ([_user(["a"])], f"{FIRST}a part 0 that is 'a'"),
        ([_user([{"text": "a"}])], f"{FIRST}a part 0 that is {{'text': 'a'}}"),
        ([_user([{"type": "text"}])], f"{FIRST}a part 0 whose text is null"),
        ([_user([{"type": "text", "text": 7}])], f"{FIRST}a part 0 whose text is 7"),
        ([USER, _assistant(None, [CALL])], NO_TURN),
        ([USER, _assistant("b", [CALL])], NO_TURN),
        ([USER, _assistant("b", CALL), USER], f"{SECOND}tool_calls {{"),
        ([USER, _assistant("b", ["f"]), USER], f"{SECOND}tool_calls ['f'], which is not a list of objects"),
    ],
)
def test_messages_that_are_refused_by_line(tmp_path: Path, messages: object, rule: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ([USER], messages, [USER])))
    keys = DataKeys(input_key="prompt", label_key=None, metadata_key="metadata", tool_key=None)
    [problem] = check_rows(str(file), keys, chat_template=True)
    assert problem.where == f"{file}:2"
    assert problem.rule.startswith(rule)
    assert problem.remedy
