"""The check of OpenAI messages in data rows, and their form for a chat template.

- Used by: `rules.data`, which checks every row before anything starts; `rollout.chat_template` renders messages that
  pass.
- Invariant: every message that a template receives has a role and a content, and both are text.
"""

from __future__ import annotations

import json
from typing import Any, cast

Fault = tuple[str, str]
"""The rule and the remedy."""
_REMEDY = "correct the line"
WEIGHT_KEY = "weight"
"""The key of a message's weight in the loss, as in OpenAI's format for fine-tuning."""


def messages_fault(prompt: Any, key: str) -> Fault | None:
    """Return why a policy cannot continue `prompt`, a row's value under `key`, as a conversation; None if it can."""
    fault = message_list_fault(prompt, key)
    if fault is not None:
        return fault
    last = cast(list[dict[str, Any]], prompt)[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        rule = f"{key!r}: the last message is the assistant's and calls a tool, so there is nothing to continue"
        return rule, "append the tool's message, or leave the calls out"
    return None


def message_list_fault(prompt: Any, key: str) -> Fault | None:
    """Return why `prompt`, a row's value under `key`, is not a list of messages for a chat template; None if it is."""
    rule = f"{key!r} is not a list of OpenAI messages ({{'role': ..., 'content': ...}})"
    if not isinstance(prompt, list) or not prompt:
        return rule, "write messages, or the text of one user message"
    messages = cast(list[Any], prompt)
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"{rule}: message {number} is {_shown(cast(object, message))}", _REMEDY
        fields = cast(dict[str, Any], message)
        role = fields.get("role")
        if not isinstance(role, str) or not role.strip():
            what = f"the role {_shown(role)}" if "role" in fields else "no role"
            return f"{rule}: message {number} has {what}", "give it one of system, user, assistant and tool"
        fault = _content_fault(fields)
        if fault is not None:
            return f"{key!r}: message {number}, of role {_shown(role)}, {fault[0]}", fault[1]
    return None


def _content_fault(message: dict[str, Any]) -> Fault | None:
    calls: object = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in cast(list[Any], calls))):
        return f"has tool_calls {_shown(cast(object, calls))}, which is not a list of objects", _REMEDY
    content = message.get("content")
    if isinstance(content, str):
        return None
    if content is None:
        remedy = 'write a text, "" for an empty one'
        return None if calls else (f"has {'content null' if 'content' in message else 'no content'}", remedy)
    if not isinstance(content, list):
        return f"has the content {_shown(content)}, which is neither text nor a list of parts", _REMEDY
    if not content:
        return "has the content [], which has no parts", 'write a text, "" for an empty one'
    for number, part in enumerate(cast(list[Any], content)):
        fields = cast(dict[str, Any], part) if isinstance(part, dict) else {}
        if fields.get("type") != "text":
            what = f"of type {_shown(fields['type'])}" if "type" in fields else _shown(cast(object, part))
            return f"has a part {number} that is {what}; the models read only text", "leave it out"
        if not isinstance(fields.get("text"), str):
            return f"has a part {number} whose text is {_shown(fields.get('text'))}", _REMEDY
    return None


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages in the form for a template: parts are joined, and a missing content becomes "".

    The arguments of a call become an object if they are the text of one, as OpenAI writes them: engines read them so,
    and a template would quote the text a second time. `weight`, which only a loss reads, is left out.
    Call it only on messages in which `messages_fault` finds no fault.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        fields = {name: value for name, value in message.items() if name != WEIGHT_KEY}
        fields["content"] = _text(message.get("content"))
        if message.get("tool_calls"):
            fields["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
        plain.append(fields)
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function: object = call.get("function")
    if isinstance(function, dict):
        return call | {"function": _with_arguments(cast(dict[str, Any], function))}
    return _with_arguments(call)


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments: object = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        value: object = json.loads(arguments)
    except ValueError:  # what a model wrote need not be JSON; the template gets it as it is
        return function
    return function | {"arguments": value} if isinstance(value, dict) else function


def _text(content: str | list[dict[str, str]] | None) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _shown(value: object) -> str:
    """Return a value for an error message of one line."""
    return "null" if value is None else repr(value)[:80]
