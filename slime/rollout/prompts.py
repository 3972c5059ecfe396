"""Prompts: read a data file and tokenize it, once.

- Called by: `data_buffer` (training) and `evaluate` load one file each, then make Samples of its prompts.
- Invariant: every prompt kept leaves room for at least one token of response. A longer prompt is left out, counted and
  reported, and is never cut.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slime.config.args import Args
from slime.config.data_files import read_rows
from slime.config.data_paths import data_paths, data_words
from slime.config.data_rows import DataError, DataKeys, Row, row_error
from slime.config.messages import plain_messages
from slime.config.prompt_format import PromptFormat
from slime.config.resuming import RowHashes
from slime.core.printable import one_line
from slime.core.sample import Message, Sample
from slime.rollout.chat_template import render_messages, render_text
from slime.rollout.tokenizer import tokenize, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_NAMED = 10
_SURE_LENGTH = 16
"""Characters for each token of context; the beginning of a longer text is tokenized before the whole text is."""


@dataclass(frozen=True)
class Prompt:
    """One row of the file. `tokens` holds the prompt alone; none for a conversation to learn from.

    Such a conversation is `prompt`, with a weight in each message. It is tokenized when it is drawn, because finding
    every message in it takes milliseconds.
    """

    prompt: str | list[Message]
    label: str | None
    tokens: list[int]
    metadata: dict[str, Any]
    row: dict[str, Any] = field(compare=False)
    """Every column of the row. All samples share it."""

    def to_sample(self, *, group_index: int, index: int) -> Sample:
        """Return a new sample; it shares only its row with other samples."""
        return Sample(
            group_index=group_index,
            index=index,
            prompt=self.prompt,
            label=self.label,
            tokens=list(self.tokens),
            prompt_length=len(self.tokens),
            metadata=copy.deepcopy(self.metadata),
            row=self.row,
        )


@dataclass(frozen=True)
class PromptSet:
    """The prompts of all files of a data set, in their order.

    The hashes cover all rows read, also those left out: `sha256` the values under the keys, `sha256_of_others` the
    other columns.
    """

    path: str
    prompts: list[Prompt]
    sizes: list[int]
    """The number of these prompts in each of the words that named the files, in order."""
    sha256: str
    sha256_of_others: str


def load_prompts(
    path: str | Sequence[str],
    args: Args,
    tokenizer: PreTrainedTokenizerBase,
    keys: DataKeys,
    *,
    longest: int | None,
    form: PromptFormat | None = None,
) -> PromptSet:
    """Read the files that `path` names (`FILE`, `FILE@[a:b]`, patterns, or a list) and tokenize their prompts.

    A prompt of more than `longest` tokens is left out. `form`: that of the data set; None: that of the flags.

    Raises:
        ValueError: with file and line or row, for one that lacks what `keys` names, or whose prompt has no tokens;
            for a file that cannot be read; if no prompt is left.
    """
    form = PromptFormat.of(args) if form is None else form
    rows = _Rows(keys)
    words = [data_paths(word) for word in data_words(path)]
    for word, file in [(word, file) for word, files in enumerate(words) for file in files]:
        for row in read_rows(file, keys):
            error = row_error(row, keys, chat_template=form.chat_template)
            if error is not None:
                raise error
            assert isinstance(row, Row), "any other is an error"
            rows.total += 1
            rows.hashes.add(row.data)
            conversation = keys.conversation(row.data)
            prompt = form.prompt(keys.prompt(row.data) if conversation is None else conversation)
            text = prompt_text(row, prompt, form, tokenizer, keys)
            if conversation is not None:
                rows.kept.append((word, row, prompt, None))
                continue
            if longest is not None and _far_too_long(text, longest, tokenizer):
                rows.dropped.append(row)
                continue
            rows.kept.append((word, row, prompt, text))
    texts = [text for *_, text in rows.kept if text is not None]
    tokens = iter(tokenize_prompts(tokenizer, texts, chat_template=form.chat_template))
    prompts: list[Prompt] = []
    sizes = [0] * len(words)
    for word, row, prompt, text in rows.kept:
        sizes[word] += 1
        if text is None:
            prompts.append(Prompt(prompt, None, [], keys.metadata(row.data), row.data))
            continue
        ids = next(tokens)
        if longest is not None and len(ids) > longest:
            rows.dropped.append(row)
            sizes[word] -= 1
            continue
        if not ids:
            raise DataError(row.where, f"the prompt under {keys.input_key!r} has no tokens", "remove the line")
        prompts.append(Prompt(prompt, keys.label(row.data), ids, keys.metadata(row.data), row.data))
    paths = [file for files in words for file in files]
    _report_dropped(paths, rows.dropped, rows.total, longest)
    named = " ".join(paths)
    if not prompts:
        raise ValueError(f"{named}: no prompt in it ({len(rows.dropped)} of {rows.total} left out as too long); "
                         "name another")  # fmt: skip
    return PromptSet(named, prompts, sizes, rows.hashes.used, rows.hashes.others)


class _Rows:
    """The rows of all files of a set as they are read: each with its word, prompt and text, and what is counted."""

    def __init__(self, keys: DataKeys) -> None:
        self.hashes = RowHashes(keys)
        self.kept: list[tuple[int, Row, str | list[Message], str | None]] = []
        self.dropped: list[Row] = []
        self.total = 0


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


def prompt_text(
    row: Row, prompt: str | list[Message], form: PromptFormat, tokenizer: PreTrainedTokenizerBase, keys: DataKeys
) -> str:
    """Return the text of a row's prompt, or of all messages of a conversation to learn from.

    Raises:
        DataError: the chat template fails on it.
    """
    if isinstance(prompt, str):
        return prompt
    tools = keys.tools(row.data)
    try:
        if keys.conversation(row.data) is not None:
            return render_text(tokenizer, plain_messages(prompt), tools, form.template_kwargs, answers=False)
        return render_messages(tokenizer, prompt, tools, form.template_kwargs)
    except Exception as error:
        rule = f"the chat template fails on it: {type(error).__name__}: {one_line(str(error))}"
        raise DataError(row.where, rule, "correct the line") from error


def _report_dropped(paths: Sequence[str], dropped: Sequence[Row], total: int, longest: int | None) -> None:
    if not dropped:
        return
    ordered = sorted(dropped, key=lambda row: row.number)
    places = [str(row.number) if len(paths) == 1 else row.where for row in ordered[:_ROWS_NAMED]]
    logger.warning(
        "%s: %d of %d prompts left out: they have more than %s tokens, and the context leaves no room to answer "
        "(lines or rows %s)",
        " ".join(paths),
        len(dropped),
        total,
        longest,
        ", ".join(places) + (", ..." if len(dropped) > _ROWS_NAMED else ""),
    )
