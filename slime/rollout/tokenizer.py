"""The tokenizer of `--hf-checkpoint`, and the two ways in which a prompt becomes tokens.

Path: loaded once by the rollout manager; prompts are tokenised here when their file is loaded, responses never are
(tokens go in and out of the engine as they are). Invariant: what the chat template wrote is tokenised without special
tokens added, because it has written them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from slime.config.args import Args
from slime.core.sample import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_TEMPLATES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What an expression in a chat template may raise, as in Python."""


def load_tokenizer(args: Args) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template.

    Raises:
        ValueError: --hf-checkpoint is missing or holds none.
    """
    from transformers import AutoTokenizer

    path = args.hf_checkpoint
    if path is None:
        raise ValueError("--hf-checkpoint: not given; prompts cannot be tokenised; name a Hugging Face directory")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=args.hf_trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf-checkpoint {path}: no tokenizer can be loaded from it: {error}") from error


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Sequence[dict[str, Any]] | None
) -> str:
    """The chat template's text, up to where the assistant's answer begins.

    transformers renders it in jinja's sandbox: a template reaches the messages, and nothing of Python.

    Raises:
        ValueError: the template has a fault, or asks for what the sandbox does not allow.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, *_OF_TEMPLATES) as error:
        raise ValueError(
            f"--hf-checkpoint {tokenizer.name_or_path}: its chat template cannot be rendered "
            f"({type(error).__name__}: {error}); take another template"
        ) from error
    assert isinstance(text, str)
    return text


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
