"""A row of a data file: its keys, its values under them, its errors, and the check of whether it can be used.

- Used by: `data_files` and `parquet_files`, which read rows; the rules and `rollout.prompts`, which check and use them.
- Invariant: a key that exists literally wins; otherwise its dots lead into nested objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

from slime.config.args import Args
from slime.config.conversations import LossOn, conversation, conversation_fault
from slime.config.messages import messages_fault

MISSING: Final = object()
"""The value of a key that a row does not have; None is the value null."""


def find(data: Mapping[str, Any], key: str) -> Any:
    """Return the value under `key`, or MISSING.

    >>> find({"reward_model": {"ground_truth": "42"}}, "reward_model.ground_truth")
    '42'
    >>> find({"a.b": 1, "a": {"b": 2}}, "a.b")
    1
    """
    if key in data:
        return data[key]
    for outer, inner in _splits(key):
        value = data.get(outer)
        if isinstance(value, dict) and (found := find(cast(dict[str, Any], value), inner)) is not MISSING:
            return found
    return MISSING


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield the parts before and after each dot, the longest first part first, because a literal key wins."""
    places = [place for place, character in enumerate(key) if character == "."]
    return ((key[:place], key[place + 1 :]) for place in reversed(places))


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """The keys under which a row has its prompt, label, metadata and tools. Dots lead into nested objects."""

    input_key: str
    label_key: str | None
    metadata_key: str
    tool_key: str | None
    loss_on: LossOn | None = None
    """The assistant's messages that supervised fine-tuning learns from; None: rows are prompts."""

    @classmethod
    def of(cls, args: Args, *, input_key: str, label_key: str | None) -> DataKeys:
        """Return the keys of a data file; the metadata and tool keys are the same for all files."""
        return cls(
            input_key=input_key,
            label_key=label_key,
            metadata_key=args.metadata_key,
            tool_key=args.tool_key,
            loss_on=args.loss_on,
        )

    @property
    def names(self) -> list[str]:
        """Return all keys, each once."""
        given = (self.input_key, self.label_key, self.metadata_key, self.tool_key)
        return list(dict.fromkeys(name for name in given if name is not None))

    def prompt(self, data: Mapping[str, Any]) -> Any:
        """Return the prompt of a row that `row_error` accepts: a text or OpenAI messages."""
        return find(data, self.input_key)

    def label(self, data: Mapping[str, Any]) -> str | None:
        """Return the label of a row that `row_error` accepts, as reward functions receive it."""
        label = None if self.label_key is None else find(data, self.label_key)
        return None if label is None or isinstance(label, list) else label_text(label)

    def conversation(self, data: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the weighted messages of a row to learn from; None for a prompt, and for a response that is a text."""
        completion = None if self.label_key is None else find(data, self.label_key)
        if self.loss_on is None or not (completion is None or isinstance(completion, list)):
            return None
        return conversation(find(data, self.input_key), cast(Any, completion), self.loss_on)

    def metadata(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metadata of a row; empty if it has none."""
        return self._or_none(data, self.metadata_key) or {}

    def tools(self, data: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return the tools of a row; None if it has none."""
        return self._or_none(data, self.tool_key)

    def values(self, data: Mapping[str, Any]) -> list[Any]:
        """Return the values under all keys, with None for those that the row does not have."""
        return [self._or_none(data, name) for name in self.names]

    @staticmethod
    def _or_none(data: Mapping[str, Any], key: str | None) -> Any:
        value = MISSING if key is None else find(data, key)
        return None if value is MISSING else value


class DataError(ValueError):
    """A fault of a file or of one of its rows, with place, rule and remedy."""

    def __init__(self, where: str, rule: str, remedy: str) -> None:
        super().__init__(where, rule, remedy)
        self.where, self.rule, self.remedy = where, rule, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}; {self.remedy}"


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    `number`: the line in a jsonl file, counted from 1, or the row in a parquet file, counted from 0 like slices.
    """

    where: str
    number: int
    data: dict[str, Any]


def unreadable(file: str, error: Exception) -> DataError:
    """Return the error of a file that cannot be read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0]
    return DataError(file, f"cannot be read ({reason})", "name a readable jsonl or parquet file")


MAX_EXACT = 2.0**53
"""The limit from which floats skip integers. An integer of more than 64 bits is read as a float."""


def row_error(row: Row | DataError, keys: DataKeys, *, chat_template: bool) -> DataError | None:
    """Return why this row cannot be used, or None if it can."""
    if isinstance(row, DataError):
        return row
    fault = _unusable(row.data, keys, chat_template)
    return None if fault is None else DataError(row.where, *fault)


def _unusable(data: dict[str, Any], keys: DataKeys, chat_template: bool) -> tuple[str, str] | None:
    """Return rule and remedy for a row that cannot be used, or None."""
    for key, flag in ((keys.input_key, "--input-key"), (keys.label_key, "--label-key")):
        if key is not None and find(data, key) is MISSING:
            return f"no key {key!r}; it has {', '.join(data) or 'none'}", f"correct the line, or {flag}"
    label = None if keys.label_key is None else find(data, keys.label_key)
    learned = keys.loss_on is not None and (keys.label_key is None or isinstance(cast(object, label), list))
    if keys.label_key is not None and not learned and not is_text_or_number(label):
        rule = f"{keys.label_key!r} is {repr(label)[:200]}, not text or a number"
        return rule, _nested_remedy(label, keys.label_key, "--label-key")
    if isinstance(label, float) and abs(label) >= MAX_EXACT:
        return f"{keys.label_key!r} is {label!r}: such a long number loses digits when it is read", "write it as text"
    columns = (
        (keys.metadata_key, dict, "an object", "--metadata-key"),
        (keys.tool_key, list, "a list", "--tool-key"),
    )
    for key, kind, named, flag in columns:
        value = None if key is None else find(data, key)
        if value is not MISSING and value is not None and not isinstance(value, kind):
            return (
                f"{key!r} is {str(value)[:80]!r}, not {named}",
                f"correct the line, or name another column with {flag}",
            )
    prompt: object = find(data, keys.input_key)
    if learned:
        fault = conversation_fault(prompt, cast(Any, label), keys.input_key, keys.label_key)
        if fault is None and not chat_template:
            return f"{keys.input_key!r} is a conversation, which the chat template renders", "add --apply-chat-template"
        return fault
    if isinstance(prompt, str):  # under a chat template, it is the text of one user message
        return None if prompt else (f"{keys.input_key!r} is empty", "remove the line")
    if isinstance(prompt, dict) and "role" not in prompt:
        fields = cast(dict[str, Any], prompt)
        remedy = _nested_remedy(fields, keys.input_key, "--input-key")
        return f"{keys.input_key!r} is an object, not text or a list of OpenAI messages", remedy
    if not chat_template:
        return f"{keys.input_key!r} is not text", "for OpenAI messages, add --apply-chat-template"
    return messages_fault(prompt, keys.input_key)


def _nested_remedy(value: object, key: str, flag: str) -> str:
    """Return the remedy for a value of a wrong type under `key`; for an object, it names a key inside it."""
    if isinstance(value, dict) and value:
        return f"name an entry of it, such as {flag} {key}.{next(iter(cast(dict[str, Any], value)))}"
    return f"correct the line, or {flag}"


def is_text_or_number(label: object) -> bool:
    """Return whether the value under a label's key can be a label."""
    if isinstance(label, float):
        return math.isfinite(label)
    return isinstance(label, str | int) and not isinstance(label, bool)


def label_text(label: str | float) -> str:
    """Return a label as reward functions receive it. A number is written without exponent: 0.00001, not 1e-05."""
    return f"{Decimal(repr(label)):f}" if isinstance(label, float) else str(label)
