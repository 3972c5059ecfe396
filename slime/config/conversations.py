"""A data row as a conversation to learn from: its messages, and the weight of each in the loss.

- Used by: `data_rows`, which checks and reads rows of supervised fine-tuning.
- Invariant: after `conversation`, every message has a weight, and a weight above 0 belongs to an assistant's message
  that says something.

Two layouts: the whole conversation under --input-key, or its beginning there and the rest, the completion, under
--label-key (TRL's conversational prompt and completion). A completion's messages are trained on, a prompt's are not.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

from slime.config.messages import WEIGHT_KEY, Fault, message_list_fault

LossOn = Literal["all_assistant", "last_assistant"]
"""The assistant's messages that are trained on."""


def conversation_fault(prompt: Any, completion: Any, input_key: str, label_key: str | None) -> Fault | None:
    """Return why nothing can be learned from a row, or None. `completion` is None without --label-key."""
    parts = [(input_key, prompt)] if completion is None else [(input_key, prompt), (label_key or "", completion)]
    if isinstance(prompt, str):
        if completion is None:
            return f"{input_key!r} is text, and there is no response", "add --label-key, or write OpenAI messages"
        if not prompt:
            return f"{input_key!r} is empty", "remove the line"
        parts = parts[1:]
    for key, messages in parts:
        fault = message_list_fault(messages, key) or _weight_fault(messages, key)
        if fault is not None:
            return fault
    key, learned = parts[-1]
    answers = [(number, message) for number, message in enumerate(learned) if message["role"] == "assistant"]
    if not answers:
        return f"{key!r} has no message of the assistant, so there is nothing to learn", "append its answer"
    if not any(_weight(message) for _, message in answers):
        return f"{key!r}: every message of the assistant has weight 0, so there is nothing to learn", "remove the line"
    for number, message in answers:
        if _weight(message) and not _says_something(message):
            rule = f"{key!r}: message {number}, of role 'assistant', is empty, so there is nothing to learn"
            return rule, "remove it, or give it the weight 0"
    return None


def _weight_fault(messages: list[dict[str, Any]], key: str) -> Fault | None:
    for number, message in enumerate(messages):
        weight = message.get(WEIGHT_KEY)
        where = f"{key!r}: message {number}, of role {message['role']!r},"
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (is_number and math.isfinite(weight) and weight >= 0):
            return f"{where} has the weight {weight!r}, which is not a number from 0", "correct the line"
        if weight and message["role"] != "assistant":
            return f"{where} has a weight, but only the assistant's messages are trained on", "leave it out"
    return None


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        return any(part["text"] for part in cast(list[dict[str, str]], content)) or bool(message.get("tool_calls"))
    return bool(content or message.get("tool_calls") or message.get("reasoning_content"))


def _weight(message: dict[str, Any]) -> float:
    weight = message.get(WEIGHT_KEY)
    return 1 if weight is None else weight


def conversation(prompt: Any, completion: Any, loss_on: LossOn) -> list[dict[str, Any]]:
    """Return the messages of a row without a fault; each has the weight that its tokens have in the loss."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else cast(list[dict[str, Any]], prompt)
    learned = cast(list[dict[str, Any]], before if completion is None else completion)
    weights: list[float] = [_weight(message) if message["role"] == "assistant" else 0 for message in learned]
    if loss_on == "last_assistant":
        last = max(number for number, message in enumerate(learned) if message["role"] == "assistant")
        weights = [weight if number == last else 0 for number, weight in enumerate(weights)]
    weighted = [message | {WEIGHT_KEY: weight} for message, weight in zip(learned, weights, strict=True)]
    if completion is None:
        return weighted
    return [*(message | {WEIGHT_KEY: 0} for message in before), *weighted]
