"""Prompts: a data file read and tokenised, once.

Path: `data_buffer` (training) and `evaluate` load a file each, then make Samples of its prompts. Invariant: every
prompt kept leaves room for at least one token of answer; one that does not is left out, counted and named, never cut.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import orjson

from slime.config.args import Args
from slime.config.data_files import split_slice
from slime.core.sample import Message, Sample
from slime.rollout.tokenizer import render_messages, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LINES_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """Where a data line has what."""

    input_key: str
    label_key: str | None
    metadata_key: str
    tool_key: str | None


@dataclass(frozen=True)
class Prompt:
    """One data line. `tokens` is the prompt alone."""

    prompt: str | list[Message]
    label: str | None
    tokens: list[int]
    metadata: dict[str, Any]

    def to_sample(self, *, group_index: int, index: int) -> Sample:
        """A sample of its own: nothing in it is shared with another."""
        return Sample(
            group_index=group_index,
            index=index,
            prompt=self.prompt,
            label=self.label,
            tokens=list(self.tokens),
            prompt_length=len(self.tokens),
            metadata=copy.deepcopy(self.metadata),
        )


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, in its order. `sha256` is of the lines that were read, dropped ones too."""

    path: str
    prompts: list[Prompt]
    sha256: str


def context_length(args: Args) -> int | None:
    """Tokens of prompt and response together at most; None where nothing limits them."""
    limits = [args.rollout_max_context_len]
    if args.architecture is not None:
        limits.append(args.architecture.max_position_embeddings)
    return min((limit for limit in limits if limit is not None), default=None)


def load_prompts(path: str, args: Args, tokenizer: PreTrainedTokenizerBase, keys: DataKeys) -> PromptSet:
    """Read `path` (`FILE` or `FILE@[a:b]`, jsonl) and tokenise its prompts.

    Raises:
        ValueError: with file and line number, for a line that is not JSON or lacks what `keys` names; for a file
            that is no jsonl, or leaves no prompt.
    """
    file, lines = _read_lines(path)
    digest = hashlib.sha256()
    texts: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in lines:
        digest.update(line + b"\n")
        where = f"{file}, line {number}"
        row = _parse_line(line, where)
        texts.append(_prompt_text(row, where, args, tokenizer, keys))
        rows.append((number, row))
    tokens = tokenize(tokenizer, texts, add_special_tokens=not args.apply_chat_template)
    limit = context_length(args)
    prompts: list[Prompt] = []
    dropped: list[int] = []
    for (number, row), ids in zip(rows, tokens, strict=True):
        if limit is not None and len(ids) > limit - 1:
            dropped.append(number)
            continue
        where = f"{file}, line {number}"
        if not ids:
            raise ValueError(f"{where}: the prompt under {keys.input_key!r} has no tokens; remove the line")
        metadata = _optional(row, keys.metadata_key, dict, where) or {}
        prompts.append(Prompt(row[keys.input_key], _label(row, keys.label_key, where), ids, metadata))
    _report_dropped(path, dropped, len(rows), limit)
    if not prompts:
        raise ValueError(f"{path}: no prompt in it ({len(dropped)} of {len(rows)} left out as too long); name another")
    return PromptSet(path, prompts, digest.hexdigest())


def _read_lines(path: str) -> tuple[Path, list[tuple[int, bytes]]]:
    """The lines that are not blank, with their numbers in the file; a slice counts such lines."""
    name, chosen = split_slice(path)
    file = Path(name)
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{file}: prompts are read from jsonl files; convert {file.suffix or 'this'} to .jsonl")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); name a jsonl file") from error
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    return file, lines[chosen]


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line has to be one JSON object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; each line has to be one JSON object")
    return row


def _prompt_text(
    row: dict[str, Any], where: str, args: Args, tokenizer: PreTrainedTokenizerBase, keys: DataKeys
) -> str:
    if keys.input_key not in row:
        raise ValueError(f"{where}: no key {keys.input_key!r} (--input-key); it has {sorted(row)}")
    prompt = row[keys.input_key]
    if not args.apply_chat_template:
        if not isinstance(prompt, str):
            raise ValueError(
                f"{where}: {keys.input_key!r} is a {type(prompt).__name__}, not text; for OpenAI messages, "
                "add --apply-chat-template"
            )
        return prompt
    if not _is_messages(prompt):
        raise ValueError(
            f"{where}: {keys.input_key!r} has to be a list of messages with 'role' (and 'content') under "
            f"--apply-chat-template, it is {str(prompt)[:80]!r}; leave the flag out for plain text"
        )
    tools = None if keys.tool_key is None else _optional(row, keys.tool_key, list, where)
    try:
        return render_messages(tokenizer, prompt, tools)
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: the chat template fails on it: {type(error).__name__}: {error}") from error


def _is_messages(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and "role" in message for message in prompt)
    )


def _optional(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = row.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{where}: {key!r} is a {type(value).__name__}; it has to be a JSON {kind.__name__}")
    return value


def _label(row: dict[str, Any], key: str | None, where: str) -> str | None:
    if key is None:
        return None
    label = row.get(key)
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"{where}: {key!r} (--label-key) has to be text or a number, it is {label!r}")
    return str(label)


def _report_dropped(path: str, dropped: Sequence[int], total: int, limit: int | None) -> None:
    if not dropped:
        return
    named = ", ".join(map(str, dropped[:_LINES_NAMED])) + (", ..." if len(dropped) > _LINES_NAMED else "")
    logger.warning(
        "%s: %d of %d prompts left out: with a context of %s tokens they leave no room to answer (lines %s)",
        path,
        len(dropped),
        total,
        limit,
        named,
    )
