"""Append new messages to existing tokens, such as a tool's result to a sampled answer.

- Called by: `append_messages` and multi-turn generate functions.
- Invariant: sampled tokens are never tokenized again. The text that ends the assistant's turn is in the tokens once,
  whether the model sampled it or was cut off before.

Example, in ChatML, for one new message of the user (`end` and `text`):

    sampled:  4 <|im_end|>             ->  4 <|im_end|> + \n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n
    cut off:  4                        ->  4 + <|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime.config.messages import plain_messages
from slime.core.sample import Message
from slime.rollout.chat_template.spans import MessageFinder
from slime.rollout.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Suffix:
    """The text after an assistant's words: `end` ends its turn, and `text` is what follows, up to the next answer.

    `end` is empty if the template has no token that ends a turn.
    """

    end: str
    text: str

    def tokens(self, tokenizer: PreTrainedTokenizerBase, sampled: Sequence[int]) -> list[int]:
        """Return the tokens to append to `sampled`, the tokens of the assistant's answer.

        They begin with the end of the turn, unless `sampled` ends with it. An answer that ends with another token (a
        second end-of-sequence token of the model) keeps it, and the template's own end follows.
        """
        [ids] = tokenize(tokenizer, [self.end + self.text], add_special_tokens=False)
        [end] = tokenize(tokenizer, [self.end], add_special_tokens=False)
        if not end or not sampled or sampled[-1] != end[-1]:
            return ids
        if ids[: len(end)] == end:  # tokens after a special one are those that they are in the whole text
            return ids[len(end) :]
        [ids] = tokenize(tokenizer, [self.text], add_special_tokens=False)
        return ids


def render_suffix(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    new_messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    generation_prompt: bool = True,
) -> Suffix:
    """Return the text between the assistant's words, which end `messages`, and its answer to `new_messages`.

    Args:
        messages: the conversation so far. Its last message is the assistant's; its tokens exist.
        new_messages: results of tools, the user's next turn, and so on.
        generation_prompt: whether the text ends with the header of the assistant's next answer.

    Raises:
        ValueError: the last of `messages` is not the assistant's, there are no new messages, or the template fails.
    """
    if not messages or messages[-1]["role"] != "assistant":
        role = repr(messages[-1]["role"]) if messages else "none, because there are no messages"
        raise ValueError(f"the last message before the new ones must be the assistant's; its role is {role}")
    if not new_messages:
        raise ValueError("there are no new messages to append; give at least one")
    earlier, last, new = plain_messages(list(messages[:-1])), messages[-1], plain_messages(list(new_messages))
    variables = dict(template_kwargs or {})
    [last] = plain_messages([last])
    if not last.get("tool_calls"):  # what was said does not matter, and may be anything that a model can write
        last = {"role": "assistant", "content": "-"}
    finder = MessageFinder(tokenizer, [*earlier, last, *new], tools, variables, answers=generation_prompt)
    return Suffix(*finder.suffix(len(earlier)))
