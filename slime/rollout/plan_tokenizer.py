"""A light tokenizer for plans: it renders and tokenizes prompts without transformers, which takes seconds to load.

- Called by: `survey`, in a --dry-run alone. A run uses `tokenizer.load_tokenizer`.
- Invariant: the template is rendered in jinja's sandbox, with the options of transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slime.config.template_text import template_text
from slime.core.imports import importing
from slime.core.small_files import read_json_object

_GENERATION = re.compile(r"(?<=\{%)(-?\s*)(end)?generation(?=\s*-?%\})")
"""A block that transformers adds to jinja. It marks the assistant's words and writes nothing, like `if true`."""


class PlanTokenizer:
    """The methods of a transformers tokenizer that prompts need, for a directory with a tokenizer.json.

    Raises:
        ValueError: the tokenizer or its chat template cannot be read without transformers.
    """

    def __init__(self, directory: str) -> None:
        with importing():
            from tokenizers import Tokenizer

        folder = Path(directory)
        self.name_or_path = directory
        try:
            self._inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"tokenizer.json cannot be read ({error})") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        settings = read_json_object(folder / "tokenizer_config.json")
        self._special = {name: _text(value) for name, value in settings.items() if name.endswith("_token")}
        self._source = template_text(folder)
        self._template: jinja2.Template | None = None

    @property
    def eos_token(self) -> str | None:
        """The text of the end-of-sequence token."""
        return self._special.get("eos_token")

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by their ids; each has `content` and `special`."""
        return self._inner.get_added_tokens_decoder()

    def __call__(
        self, texts: Sequence[str], *, add_special_tokens: bool, verbose: bool, return_offsets_mapping: bool = False
    ) -> dict[str, list[list[Any]]]:
        """Return the token ids of each text under `input_ids`, and their characters under `offset_mapping`."""
        encoded: list[Any] = self._inner.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        offsets = {"offset_mapping": [each.offsets for each in encoded]} if return_offsets_mapping else {}
        return {"input_ids": [each.ids for each in encoded], **offsets}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **variables: Any,
    ) -> str:
        """Return the template's text, up to the end of the last message if that is continued."""
        if self._template is None:
            if self._source is None:
                raise ValueError("there is no chat template")
            self._template = _environment().from_string(_GENERATION.sub(_always, self._source))
        given = {**self._special, "documents": None, **variables}
        text = self._template.render(
            messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **given
        )
        if not continue_final_message:
            return text
        last = str(messages[-1]["content"]).lstrip()
        start = text.rindex(last.strip())
        return text[: start + len(last if text.startswith(last, start) else last.strip())]


def _always(block: re.Match[str]) -> str:
    return f"{block[1]}endif" if block[2] else f"{block[1]}if true"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # pyright: ignore
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _text(token: Any) -> Any:
    """Return the text of a special token, which is a text or an object with `content`."""
    return cast(Mapping[str, Any], token).get("content") if isinstance(token, dict) else token
