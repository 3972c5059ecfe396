"""Render a conversation with the tokenizer's chat template, up to where the assistant's answer begins or continues.

- Called by: `prompts` renders every row here; `spans`, `suffix` and `report` call `render_text` for their renderings.
- Invariant: a conversation that ends with the assistant's words is continued (prefill), without a second turn of the
  assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from slime.config.messages import plain_messages
from slime.core.sample import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_TEMPLATES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors that an expression in a chat template may raise, as in Python."""
_USUAL_ROLES = ("system", "user", "assistant", "tool")


def continues_last_turn(messages: Sequence[Message]) -> bool:
    """Return whether the response continues the last message, which is then the assistant's."""
    return messages[-1]["role"] == "assistant"


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Sequence[dict[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Return the chat template's text, up to where the assistant's answer begins or continues.

    `template_kwargs`: further variables that the template reads, such as {"enable_thinking": False}.
    transformers renders it in jinja's sandbox: a template can read the messages, and nothing of Python.

    Raises:
        ValueError: the template fails, uses what the sandbox forbids, or leaves out a message whose role is not one of
            the usual ones.
    """
    messages = plain_messages(messages)
    variables = dict(template_kwargs or {})
    text = render_text(tokenizer, messages, tools, variables)
    for number, message in enumerate(messages):
        if message["role"] not in _USUAL_ROLES and len(messages) > 1 and message["content"]:
            others = messages[:number] + messages[number + 1 :]
            try:
                is_left_out = render_text(tokenizer, others, tools, variables) == text
            except ValueError:  # the template cannot do without the message
                is_left_out = False
            if is_left_out:
                raise ValueError(
                    f"--hf-checkpoint {tokenizer.name_or_path}: its chat template leaves out message {number}, whose "
                    f"role is {message['role']!r}; give it a role that the template knows"
                )
    return text


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: Sequence[dict[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    answers: bool | None = None,
) -> str:
    """Return the chat template's text of `plain_messages`.

    `answers`: True ends the text with the generation prompt, and False ends it with the last message. None continues
    the last message if it is the assistant's, and ends with the generation prompt otherwise.

    Raises:
        ValueError: the template fails, or uses what the sandbox forbids.
    """
    continues = answers is None and continues_last_turn(messages)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=not continues if answers is None else answers,
            continue_final_message=continues,
            **variables,
        )
    except (jinja2.TemplateError, *_OF_TEMPLATES) as error:
        raise ValueError(
            f"--hf-checkpoint {tokenizer.name_or_path}: its chat template cannot be rendered "
            f"({type(error).__name__}: {error}); take another template"
        ) from error
    assert isinstance(text, str)
    return text
