"""Prompts: read a data file and tokenize it, once.

- Called by: `data_buffer` (training) and `evaluate` load one file each, then make Samples of its prompts.
- Invariant: every prompt kept leaves room for at least one token of response. A longer prompt is left out, counted and
  reported, and is never cut.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from slime.config.args import Args
from slime.config.data_files import DataError, DataKeys, Row, label_text, read_rows, row_error
from slime.core.printable import one_line
from slime.core.sample import Message, Sample
from slime.rollout.chat_template import render_messages
from slime.rollout.tokenizer import tokenize, tokenize_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_NAMED = 10
_SURE_LENGTH = 16
"""Characters for each token of context; the beginning of a longer text is tokenized before the whole text is."""


@dataclass(frozen=True)
class Prompt:
    """One row of the file. `tokens` holds the prompt alone."""

    prompt: str | list[Message]
    label: str | None
    tokens: list[int]
    metadata: dict[str, Any]

    def to_sample(self, *, group_index: int, index: int) -> Sample:
        """Return a new sample; it shares nothing with other samples."""
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
    """The prompts of one file, in its order. `sha256` covers all rows read, also those left out."""

    path: str
    prompts: list[Prompt]
    sha256: str


def load_prompts(
    path: str, args: Args, tokenizer: PreTrainedTokenizerBase, keys: DataKeys, *, longest: int | None
) -> PromptSet:
    """Read `path` (`FILE` or `FILE@[a:b]`, jsonl or parquet) and tokenize its prompts.

    A prompt of more than `longest` tokens is left out.

    Raises:
        ValueError: with file and line or row, for one that lacks what `keys` names, or whose prompt has no tokens;
            for a file that cannot be read, or leaves no prompt.
    """
    digest = hashlib.sha256()
    total = 0
    texts: list[str] = []
    rows: list[Row] = []
    dropped: list[int] = []
    for row in read_rows(path, keys):
        error = row_error(row, keys, chat_template=args.apply_chat_template)
        if error is not None:
            raise error
        assert isinstance(row, Row), "any other is an error"
        digest.update(orjson.dumps([row.data.get(name) for name in keys.names], option=orjson.OPT_SORT_KEYS))
        total += 1
        text = _prompt_text(row, args, tokenizer, keys)
        if longest is not None and _far_too_long(text, longest, tokenizer):
            dropped.append(row.number)
            continue
        texts.append(text)
        rows.append(row)
    if args.apply_chat_template:
        tokens = tokenize(tokenizer, texts, add_special_tokens=False)
    else:
        tokens = tokenize_texts(tokenizer, texts)
    prompts: list[Prompt] = []
    for row, ids in zip(rows, tokens, strict=True):
        if longest is not None and len(ids) > longest:
            dropped.append(row.number)
            continue
        if not ids:
            raise DataError(row.where, f"the prompt under {keys.input_key!r} has no tokens", "remove the line")
        label = None if keys.label_key is None else label_text(row.data[keys.label_key])
        prompts.append(Prompt(row.data[keys.input_key], label, ids, row.data.get(keys.metadata_key) or {}))
    _report_dropped(path, sorted(dropped), total, longest)
    if not prompts:
        raise ValueError(f"{path}: no prompt in it ({len(dropped)} of {total} left out as too long); name another")
    return PromptSet(path, prompts, digest.hexdigest())


def _far_too_long(text: str, longest: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the beginning of a long text alone shows that it has more than `longest` tokens.

    Tokenizing takes microseconds a token, which is minutes for a text of many megabytes that cannot be used. The text
    after a beginning changes only its last tokens. So if the beginning has twice as many tokens as allowed, the whole
    text has too many as well.
    """
    size = _SURE_LENGTH * max(longest, 1)
    while len(text) > size:
        [ids] = tokenize(tokenizer, [text[:size]], add_special_tokens=False)
        if len(ids) > 2 * max(longest, 1):
            return True
        size *= 4  # few tokens for so many characters (a run of spaces may be one)
    return False


def _prompt_text(row: Row, args: Args, tokenizer: PreTrainedTokenizerBase, keys: DataKeys) -> str:
    prompt = row.data[keys.input_key]
    if not args.apply_chat_template:
        return prompt
    tools = None if keys.tool_key is None else row.data.get(keys.tool_key)
    try:
        return render_messages(tokenizer, prompt, tools)
    except Exception as error:
        rule = f"the chat template fails on it: {type(error).__name__}: {one_line(str(error))}"
        raise DataError(row.where, rule, "correct the line") from error


def _report_dropped(path: str, dropped: Sequence[int], total: int, longest: int | None) -> None:
    if not dropped:
        return
    named = ", ".join(map(str, dropped[:_ROWS_NAMED])) + (", ..." if len(dropped) > _ROWS_NAMED else "")
    logger.warning(
        "%s: %d of %d prompts left out: they have more than %s tokens, and the context leaves no room to answer "
        "(lines or rows %s)",
        path,
        len(dropped),
        total,
        longest,
        named,
    )
