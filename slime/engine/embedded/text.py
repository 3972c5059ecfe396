"""Convert token ids to text and back, with the `tokenizers` library alone (transformers takes seconds to import).

- Called by: `settings` for the tokens that end a text; `server` to render responses and to look for stop texts.
- Invariant: without tokenizer.json there is no text, and a request that needs it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from slime.config.end_tokens import END_OF_MESSAGE, read_json_object
from slime.engine.protocol import SamplingParams


class Text:
    """The tokenizer.json of a model directory, if there is one."""

    def __init__(self, model_path: str | Path) -> None:
        self._file = Path(model_path) / "tokenizer.json"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self._file))

    @cached_property
    def available(self) -> bool:
        return self._file.is_file()

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens with which the tokenizer ends a text; empty if it names none."""
        if not self.available:
            return frozenset()
        eos = read_json_object(self._file.with_name("tokenizer_config.json")).get("eos_token")
        named = cast(dict[str, Any], eos).get("content") if isinstance(eos, dict) else eos
        texts = [END_OF_MESSAGE, named] if isinstance(named, str) else [END_OF_MESSAGE]
        ids = map(self._tokenizer.token_to_id, texts)
        return frozenset(number for number in ids if number is not None)

    def _need(self, what: str) -> Tokenizer:
        if not self.available:
            raise ValueError(f"{what} needs a tokenizer, and there is no {self._file}; send input_ids and token ids")
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        return self._need("text").encode(text).ids

    def stop_check(self, stops: Sequence[str]) -> Callable[[Sequence[int]], str | None] | None:
        """Return a function that finds the first of `stops` in the tail of an output; None without stop texts.

        The tail is as long as SGLang's: one token more than the longest stop text has when it is tokenized. A stop text
        that the model spells with more tokens is missed, here as there.
        """
        if not stops:
            return None
        tokenizer = self._need("stop")
        count = max(len(tokenizer.encode(stop, add_special_tokens=False).ids) for stop in stops) + 1

        def check(output_ids: Sequence[int]) -> str | None:
            tail = tokenizer.decode(list(output_ids[-count:]), skip_special_tokens=False)
            return next((stop for stop in stops if stop in tail), None)

        return check

    def render(self, output_ids: Sequence[int], params: SamplingParams, matched: int | str | None) -> str:
        """Decode the response to text; the stop token or text is cut off, unless `no_stop_trim`."""
        if not self.available:
            return ""
        ids = list(output_ids)
        if isinstance(matched, int) and not params.no_stop_trim and ids and ids[-1] == matched:
            ids.pop()
        text = self._tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(matched, str) and not params.no_stop_trim and matched in text:
            text = text[: text.index(matched)]
        return text
