"""The place of each message in a rendered conversation, and the tokens that are the assistant's own words.

- Called by: `sft_rollout`, whose loss masks are these spans; `suffix`; `survey`, which marks trained text.
- Invariant: the spans tile the text, and every token belongs to the words of at most one assistant message. The whole
  conversation is rendered once, so a template that writes earlier turns in another way (without their reasoning) gets
  spans in the text that the model reads.

How a message is found: the conversation is rendered again with a character in its place that occurs nowhere else. What
both texts begin with is before the message, and what both end with is after it. Example (`X` replaces "Hi"):

    <|im_start|>assistant\n Hi <|im_end|>\n ...
    <|im_start|>assistant\n X  <|im_end|>\n ...

The assistant's own words begin where the generation prompt ends, because the model writes what comes after it, also
text that the template adds there (such as an empty reasoning block). They end with the token that ends the turn. In a
template without such tokens (GLM-4's), the token of the next role ends the turn, and the model samples that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime.config.messages import plain_messages
from slime.core.sample import Message
from slime.rollout.chat_template.render import render_text
from slime.rollout.tokenizer import offset_tokens, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_TOKEN = 100
"""Characters of the longest special token."""
_FIRST_MARK = 0xE000
"""The first character of Unicode's private use area: no text should have it."""


@dataclass(frozen=True)
class MessageSpan:
    """One message's part of the text, `[start, end)`.

    `words` to `words_end` is what it says. An assistant's words begin after the generation prompt, and include the
    token that ends the turn if `closed`.
    """

    role: str
    start: int
    words: int
    words_end: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Conversation:
    """A whole conversation as the template renders it, with the span of each message."""

    text: str
    spans: tuple[MessageSpan, ...]

    def words(self, number: int) -> str:
        """Return what message `number` says; with the token that ends the turn if it is the assistant's."""
        span = self.spans[number]
        return self.text[span.words : span.words_end]


@dataclass(frozen=True)
class ConversationTokens:
    """The tokens of a conversation. `message_T[t]` is the assistant message whose own words token t is in, else -1."""

    ids: list[int]
    message_T: list[int]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    answers_only: bool = False,
) -> Conversation:
    """Render all messages, without a generation prompt, and find each of them.

    `answers_only` finds only what the assistant says, three times faster; all else belongs to the span before it.

    If the last message is the assistant's and the template does not end it, the tokenizer's EOS is appended.

    Raises:
        ValueError: the template fails, or it cannot be told where an assistant's message is.
    """
    finder = MessageFinder(tokenizer, plain_messages(messages), tools, dict(template_kwargs or {}))
    return finder.conversation(answers_only=answers_only)


@dataclass(frozen=True)
class _Place:
    """The part of the text that changes with a message. If not `exact`, the message says more after it.

    `alone`: nothing but the message's content changes with it.
    """

    low: int
    high: int
    exact: bool
    alone: bool

    def overlaps(self, other: _Place) -> bool:
        return self.low < other.high and other.low < self.high


class MessageFinder:
    """Finds the messages of one conversation in its text, which ends with a generation prompt if `answers`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        tools: Sequence[dict[str, Any]] | None,
        variables: dict[str, Any],
        *,
        answers: bool = False,
    ) -> None:
        self._tokenizer, self._messages, self._tools, self._variables = tokenizer, messages, tools, variables
        self._answers = answers
        self._prefixes: dict[tuple[int, bool], str | None] = {}
        self._text = render_text(tokenizer, messages, tools, variables, answers=answers)
        self._special = special_pattern(tokenizer)
        places = range(_FIRST_MARK, _FIRST_MARK + len(self._text) + 1)
        self._mark = next(chr(place) for place in places if chr(place) not in self._text)

    def conversation(self, *, answers_only: bool) -> Conversation:
        found = {n: self._place(n) for n, message in enumerate(self._messages) if message["role"] == "assistant"}
        # an answer that changes more of the text has to be compared with the places of all messages
        quick = answers_only and all(place is not None and place.alone for place in found.values())
        numbers = range(len(self._messages))
        places = self._ordered([found[n] if n in found else None if quick else self._place(n) for n in numbers])
        spans: list[MessageSpan] = []
        before = 0  # the end of the last message's words
        for number, (message, place) in enumerate(zip(self._messages, places, strict=True)):
            limit = next((each.low for each in places[number + 1 :] if each is not None), len(self._text))
            ends = before if place is None else max(place.high, before)
            end = ends
            if message["role"] == "assistant":
                assert place is not None, "otherwise it is lost"
                self._check_complete(number)
                start, low = self._generation_prompt(number, before, max(place.low, before), quick=quick)
                ends, end = self._end_of_turn(low, max(place.high, low), limit, exact=place.exact)
            else:
                low = before if place is None else max(place.low, before)
                start = before if quick else self._boundary(number, before, low)
            spans.append(MessageSpan(message["role"], start, low, end, end, closed=end > ends))
            before = end
        return self._tiled(spans)

    def _ordered(self, places: Sequence[_Place | None]) -> list[_Place | None]:
        """Return the places without those of messages that the template writes elsewhere, such as a system message.

        Raises:
            ValueError: the place of an assistant's message overlaps that of another message.
        """
        ordered: list[_Place | None] = []
        of_answers = zip(places, self._messages, strict=True)
        answers = [place for place, message in of_answers if place is not None and message["role"] == "assistant"]
        after: list[int] = []
        limit = len(self._text)
        for place, message in zip(reversed(places), reversed(self._messages), strict=True):
            after.append(limit)
            limit = limit if place is None or message["role"] != "assistant" else min(limit, place.low)
        before = 0
        for number, (place, limit) in enumerate(zip(places, reversed(after), strict=True)):
            fits = place is not None and before <= place.low and place.high <= limit
            if not fits and self._messages[number]["role"] == "assistant":
                raise ValueError(self._lost(number))
            if not fits and place is not None and any(place.overlaps(each) for each in answers):
                raise ValueError(self._lost(number))
            ordered.append(place if fits else None)
            before = place.high if fits and place is not None else before
        return ordered

    def _check_complete(self, number: int) -> None:
        """Raise ValueError if the template leaves out an assistant's calls, or what it says next to them."""
        message = self._messages[number]
        if not message.get("tool_calls"):
            return
        marked = [("the tool calls", message | {"tool_calls": self._marked_calls(message)})]
        if message["content"].strip():
            marked.append(("the content next to the tool calls", message | {"content": self._mark}))
        for what, variant in marked:
            text = self._with(number, variant)
            if text is not None and self._mark not in text:
                raise ValueError(
                    f"--hf-checkpoint {self._tokenizer.name_or_path}: its chat template leaves out {what} of message "
                    f"{number}; remove them from the data, or take another template"
                )

    def suffix(self, number: int) -> tuple[str, str]:
        """Return the text that ends the turn of message `number`, the assistant's, and the text after it."""
        place = self._place(number)
        assert place is not None, "only other roles have none"
        start, end = self._end_of_turn(place.low, place.high, len(self._text), exact=place.exact)
        return self._text[start:end], self._text[end:]

    def _lost(self, number: int) -> str:
        return (
            f"--hf-checkpoint {self._tokenizer.name_or_path}: in its chat template's text it cannot be told where "
            f"message {number}, of role {self._messages[number]['role']!r}, is, because several parts of the text "
            "change with it; take another template"
        )

    def _place(self, number: int) -> _Place | None:
        """Return the part of the text that changes with a message; None if none does, which no assistant's may."""
        message = self._messages[number]
        replaced = {"role": "assistant"} if message["role"] == "assistant" else message
        variants: list[tuple[Message, bool]] = [(replaced | {"content": self._mark}, True)]
        if message.get("tool_calls"):  # a template may require the calls before the tool's message
            variants.append((message | {"tool_calls": self._marked_calls(message)}, False))
        for variant, exact in variants:
            text = self._with(number, variant)
            if text is not None and message["role"] == "assistant" and text.count(self._mark) > 1:
                raise ValueError(self._lost(number))
            if text is not None and self._mark in text:
                low, high = _difference(self._text, text)
                alone = exact and text[low : len(text) - len(self._text) + high] == self._mark
                return _Place(self._outside(low), self._outside(high), exact, alone)
        if message["role"] == "assistant":
            raise ValueError(
                f"--hf-checkpoint {self._tokenizer.name_or_path}: its chat template leaves out message {number}, of "
                "role 'assistant'; take another template"
            )
        return None

    def _with(self, number: int, variant: Message) -> str | None:
        """Return the text with another message in a place; None if the template refuses it."""
        changed = [*self._messages[:number], variant, *self._messages[number + 1 :]]
        try:
            return render_text(self._tokenizer, changed, self._tools, self._variables, answers=self._answers)
        except ValueError:
            return None

    def _outside(self, place: int) -> int:
        """Return the beginning of the special token in which a place is, so that no token is split.

        The texts with and without a call may differ in the middle of `<|eom_id|>` and `<|eot_id|>`.
        """
        around = re.compile(self._special).finditer(self._text, max(0, place - _LONGEST_TOKEN), place + _LONGEST_TOKEN)
        return next((found.start() for found in around if found.start() < place < found.end()), place)

    def _marked_calls(self, message: Message) -> list[Any]:
        calls = list(message["tool_calls"])
        last = dict(calls[-1])
        if isinstance(last.get("function"), dict):
            last["function"] = last["function"] | {"name": self._mark}
        else:
            last["name"] = self._mark
        return [*calls[:-1], last]

    def _generation_prompt(self, number: int, before: int, low: int, *, quick: bool) -> tuple[int, int]:
        """Return where the generation prompt of an assistant's message begins, and where it ends.

        Where the text does not have the prompt, the words begin with the message's variable part.
        """
        asked = self._prefix(number, answers=True)
        if quick and asked is not None and self._text.startswith(asked) and len(asked) >= before:
            return len(asked), len(asked)
        plain = self._prefix(number, answers=False)
        prompt = asked[len(plain) :] if asked is not None and plain is not None and asked.startswith(plain) else ""
        if asked is not None and self._text.startswith(asked) and len(asked) >= before:
            return max(before, len(asked) - len(prompt)), len(asked)
        if quick and number and (earlier := self._place(number - 1)) is not None and earlier.high <= low:
            before = max(before, earlier.high)
        if not prompt and asked is not None:  # what ends the message before it takes the prompt's place: [/INST]
            sizes = range(low - before, 0, -1)
            size = next((size for size in sizes if asked.endswith(self._text[before : before + size])), 0)
            return (before + size, before + size) if size else (before, low)
        place = self._text.rfind(prompt, before, low) if prompt else -1
        if place >= 0:
            return place, place + len(prompt)
        return self._boundary(number, before, low), low

    def _prefix(self, count: int, *, answers: bool) -> str | None:
        """Return the text of the first messages; None if the template does not take a conversation that ends there."""
        if count and (count, answers) not in self._prefixes:
            try:
                text = render_text(
                    self._tokenizer, self._messages[:count], self._tools, self._variables, answers=answers
                )
            except ValueError:
                text = None
            self._prefixes[count, answers] = text
        return self._prefixes[count, answers] if count else None

    def _boundary(self, number: int, before: int, low: int) -> int:
        """Return where a message begins, with its header: after the end of the one before it."""
        earlier = self._prefix(number, answers=False)
        if earlier is not None and before <= len(earlier) <= low and self._text.startswith(earlier):
            return len(earlier)
        return before

    def _end_of_turn(self, low: int, high: int, limit: int, *, exact: bool) -> tuple[int, int]:
        """Return where the token that ends an assistant's turn begins and ends; no text if there is none."""
        if exact:
            found = re.compile(rf"\s*(?:{self._special})").match(self._text, high)
        else:  # after `high` comes the rest of a call
            found = re.compile(self._special).search(self._text, high, limit)
        if found is not None:
            return found.span()
        end = low + len(self._text[low:high].rstrip())
        said = re.search(rf"(?:{self._special})\Z", self._text[low:end])
        return (low + said.start(), end) if said is not None else (high, high)

    def _tiled(self, spans: list[MessageSpan]) -> Conversation:
        """Return the conversation, with an end for its last answer, and each span up to the next."""
        text, last = self._text, spans[-1]
        if last.role == "assistant" and not last.closed:
            end = self._tokenizer.eos_token
            if not isinstance(end, str):
                raise ValueError(
                    f"--hf-checkpoint {self._tokenizer.name_or_path}: its tokenizer names no eos_token to end a "
                    "response"
                )
            text = text[: last.words_end] + end
            spans[-1] = MessageSpan(last.role, last.start, last.words, len(text), len(text), True)
        starts = [0, *[span.start for span in spans[1:]], len(text)]
        tiled = [
            MessageSpan(span.role, starts[number], span.words, span.words_end, starts[number + 1], span.closed)
            for number, span in enumerate(spans)
        ]
        return Conversation(text, tuple(tiled))


def _difference(text: str, other: str) -> tuple[int, int]:
    """Return the part of `text` that differs from `other`: after their common beginning, before their common end."""
    low = _num_common(text, other)
    return low, len(text) - _num_common(text[low:][::-1], other[low:][::-1])


def _num_common(text: str, other: str) -> int:
    """Return the number of characters with which both begin; by bisection, because a loop over characters is slow."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a regular expression that matches any special token of the tokenizer."""
    names = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= {tokenizer.eos_token} if isinstance(tokenizer.eos_token, str) else set()
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> ConversationTokens:
    """Tokenize a conversation, and tell which tokens are an assistant's own words.

    The tokens are those of the whole text. Only where one would lie across the beginning or the end of an assistant's
    words, the text is cut there, because a model that generates them never sees that token: the prompt's tokens end
    before the first token of the answer.
    """
    spans = [(span.words, span.words_end) for span in conversation.spans if span.role == "assistant"]
    cuts = sorted({place for span in spans for place in span if 0 < place < len(conversation.text)})
    [(ids, ranges)] = offset_tokens(tokenizer, [conversation.text])
    crossed = [cut for cut in cuts if any(low < cut < high for low, high in ranges)]
    if crossed:
        ids, ranges = _cut_tokens(tokenizer, conversation.text, crossed)
    message_T: list[int] = []
    words = [(n, s.words, s.words_end) for n, s in enumerate(conversation.spans) if s.role == "assistant"]
    for low, high in ranges:
        while words and words[0][2] <= low:
            words.pop(0)
        number, start, end = words[0] if words else (-1, len(conversation.text), len(conversation.text))
        message_T.append(number if start <= low and high <= end and high > start else -1)
    return ConversationTokens(ids, message_T)


def _cut_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize the pieces between cuts; each piece after the first follows a special token, as in a longer text."""
    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        anchor = tokenizer.eos_token if start and isinstance(tokenizer.eos_token, str) else ""
        [before] = tokenize(tokenizer, [anchor], add_special_tokens=False)
        [(piece, places)] = offset_tokens(tokenizer, [anchor + text[start:end]])
        skipped = len(before) if piece[: len(before)] == before else 0
        ids += piece[skipped:]
        ranges += [(low + start - len(anchor), high + start - len(anchor)) for low, high in places[skipped:]]
    return ids, ranges
