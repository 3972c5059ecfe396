"""The report on a chat template: whether a longer conversation begins with the text and tokens of a shorter one.

- Called by: whoever appends messages to tokens that exist, and checks of the model directory.
- Invariant: an offence is found by rendering short conversations, never by reading the template.

A template is append-only if a longer conversation begins with the text of a shorter one. With any other template, the
earlier turns of a conversation that is rendered again are no longer the tokens that the model sampled. `suffix` keeps
the sampled tokens and never tokenizes them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime.core.sample import Message
from slime.rollout.chat_template.render import render_text
from slime.rollout.chat_template.spans import render_conversation
from slime.rollout.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Two and two?"}
_ANSWER = {"role": "assistant", "content": "Four."}
_MORE = {"role": "user", "content": "And three?"}
_LAST = {"role": "assistant", "content": "Seven."}
_THOUGHT = "I add."
_TAGGED = {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\nFour."}
_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"numbers": {"type": "array"}}},
        },
    }
]
_CALLS: list[Message] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": {"numbers": [2, 2]}}}
        ],
    },
    {"role": "tool", "name": "add", "tool_call_id": "abcdef123", "content": "4"},
]
_OTHER_DAY = "a day that never was"


@dataclass(frozen=True)
class TemplateReport:
    """The ways in which a chat template changes earlier turns (`offences`), and what it cannot do (`limits`)."""

    offences: tuple[str, ...]
    limits: tuple[str, ...] = ()

    @property
    def append_only(self) -> bool:
        """Whether the text and the tokens of a longer conversation begin with those of a shorter one."""
        return not self.offences


def template_report(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
) -> TemplateReport:
    """Report what the tokenizer's chat template does to earlier turns.

    Raises:
        ValueError: the template renders not even one message of a user.
    """
    probe = _Probe(tokenizer, dict(template_kwargs or {}))
    probe.render([_USER], answers=True)
    return TemplateReport(tuple(probe.offences()), tuple(probe.limits()))


class _Probe:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any]) -> None:
        self._tokenizer, self._variables = tokenizer, variables

    def render(
        self, messages: list[Message], *, answers: bool = False, tools: Sequence[dict[str, Any]] = (), **variables: Any
    ) -> str:
        return render_text(self._tokenizer, messages, tools, self._variables | variables, answers=answers)

    def limits(self) -> Iterator[str]:
        for name, messages, tools in (
            ("a system message", [_SYSTEM, _USER], []),
            ("a tool's result", [_USER, *_CALLS], _TOOLS),
            ("two messages of a user in a row", [_USER, _MORE], []),
        ):
            try:
                self.render(messages, tools=tools)
            except ValueError as error:
                yield f"cannot render {name}: {error}"
        if not render_conversation(self._tokenizer, [_USER, _ANSWER, _MORE], None, self._variables).spans[1].closed:
            yield "has no token that ends an assistant's turn"

    def offences(self) -> Iterator[str]:
        turns = [_USER, _ANSWER, _MORE, _LAST, _USER]
        plain = self._changed(turns)
        if plain is not None:
            yield f"writes its last turn in another way than earlier ones: {plain}"
        header = None if plain is not None else self._unlike_prompt()
        if header is not None:
            yield header
        yield from self._system(plain is None)
        yield from self._reasoning()
        if plain is None and (moved := self._changed([_USER, *_CALLS, _LAST, _MORE], tools=_TOOLS)) is not None:
            yield f"writes tools or their calls in another place or way as the conversation grows: {moved}"
        if _differs(self, [_USER], strftime_now=lambda _form: _OTHER_DAY):
            yield "writes today's date into the text: give it in --apply-chat-template-kwargs if the template reads one"
        spaced = self.render([_USER, {"role": "assistant", "content": " \n b \n "}])
        if " \n b \n " not in spaced:
            yield "trims the white space around an answer, which may have been sampled with it"

    def _changed(self, messages: list[Message], tools: Sequence[dict[str, Any]] = ()) -> str | None:
        """Return how the rendering of a longer conversation differs from that of a shorter one; None if it does not."""
        ends = range(1, len(messages) + 1)
        try:
            texts = [self.render(messages[:end], tools=tools) for end in ends]
        except ValueError:  # a limit, which is reported as such
            return None
        for shorter, longer in itertools.pairwise(texts):
            if not longer.startswith(shorter):
                return _first_difference(shorter, longer)
            ids, more = tokenize(self._tokenizer, [shorter, longer], add_special_tokens=False)
            if more[: len(ids)] != ids:
                return "the text is the same, but its last tokens merge with those of the next turn"
        return None

    def _unlike_prompt(self) -> str | None:
        asked, answered = self.render([_USER], answers=True), self.render([_USER, _ANSWER])
        if answered.startswith(asked):
            return None
        return f"an answer does not begin with the generation prompt: {_first_difference(asked, answered)}"

    def _system(self, plain: bool) -> Iterator[str]:
        try:
            text = self.render([_SYSTEM, _USER])
        except ValueError:  # a limit
            return
        if str(_SYSTEM["content"]) not in text:
            yield "leaves the system message out"
        elif plain and (moved := self._changed([_SYSTEM, _USER, _ANSWER, _MORE, _LAST])) is not None:
            yield f"moves the system message as the conversation grows: {moved}"

    def _reasoning(self) -> Iterator[str]:
        stripped: list[str] = []
        fielded = _ANSWER | {"reasoning_content": _THOUGHT}
        for form, answer in (("<think>...</think>", _TAGGED), ("the field reasoning_content", fielded)):
            last, earlier = self.render([_USER, answer]), self.render([_USER, answer, _MORE])
            if _THOUGHT in last and _THOUGHT not in earlier:
                stripped.append(form)
        if stripped:
            yield f"strips the reasoning of earlier turns ({' and '.join(stripped)})"


def _differs(probe: _Probe, messages: list[Message], **variables: Any) -> bool:
    return probe.render(messages) != probe.render(messages, **variables)


def _first_difference(text: str, other: str) -> str:
    """Return the places where two texts begin to differ, for an error of one line."""
    place = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return f"{text[place : place + 30]!r} becomes {other[place : place + 30]!r}"
