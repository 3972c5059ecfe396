"""Token ids to text and back, with the `tokenizers` library alone (transformers takes seconds to import).

Path: `server` renders responses and looks for stop strings. Invariant: nothing is read before somebody needs text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

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

    def _need(self, what: str) -> Tokenizer:
        if not self.available:
            raise ValueError(f"{what} needs a tokenizer, and there is no {self._file}; send input_ids and token ids")
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        return self._need("text").encode(text).ids

    def stop_check(self, stops: Sequence[str]) -> Callable[[Sequence[int]], str | None] | None:
        """A function that finds the first of `stops` at the end of an output; None where there are none."""
        if not stops:
            return None
        tokenizer = self._need("stop")
        longest = max(map(len, stops))

        def text_of(ids: Sequence[int]) -> str:
            return tokenizer.decode(list(ids), skip_special_tokens=False)

        def check(output_ids: Sequence[int]) -> str | None:
            # As many tokens as a stop string can reach back from the newest one; some tokens hold no text.
            needed, count = longest - 1 + len(text_of(output_ids[-1:])), longest + 1
            tail = text_of(output_ids[-count:])
            while len(tail) < needed and count < len(output_ids):
                count *= 2
                tail = text_of(output_ids[-count:])
            return next((s for s in stops if s in tail), None)

        return check

    def render(self, output_ids: Sequence[int], params: SamplingParams, matched: int | str | None) -> str:
        """The response as text; what stopped it is cut off, unless `no_stop_trim`."""
        if not self.available:
            return ""
        ids = list(output_ids)
        if isinstance(matched, int) and not params.no_stop_trim and ids and ids[-1] == matched:
            ids.pop()
        text = self._tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        if isinstance(matched, str) and not params.no_stop_trim and matched in text:
            text = text[: text.index(matched)]
        return text
