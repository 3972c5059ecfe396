"""The form in which the prompts of a data set reach the policy: as plain text, or through the chat template.

- Used by: `rollout.prompts`, for the training set and each evaluation set.
- Invariant: a text under --apply-chat-template is the text of one user message, so that all data layouts with the same
  words give the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

from slime.config.args import Args
from slime.config.eval_data import EvalDataset


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Whether prompts go through the chat template, and what is given to it next to the row."""

    chat_template: bool
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, args: Args | EvalDataset) -> Self:
        """Return the format of the training set, or of an evaluation set."""
        return cls(
            chat_template=bool(args.apply_chat_template),
            system_prompt=args.system_prompt,
            template_kwargs=json.loads(args.apply_chat_template_kwargs or "{}"),
        )

    def prompt(self, value: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """Return a row's prompt as `sample.prompt` holds it: the text, or the messages that the template renders.

        The system prompt comes first, unless the row has a system message of its own.
        """
        if not self.chat_template:
            return value
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        if self.system_prompt is None or any(message["role"] == "system" for message in messages):
            return messages
        return [cast(dict[str, Any], {"role": "system", "content": self.system_prompt}), *messages]
