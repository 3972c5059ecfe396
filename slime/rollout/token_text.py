"""From tokens to text, exactly as the tokenizer decodes them, without asking it for every token.

- Called by: `context.decode`, and `generate` and `multi_turn` for the text of a response that has got longer.
- Invariant: the text is that of the tokenizer's `decode` of all tokens of the response, to the character. The text in
  an engine's answer is not used: an engine decodes a part of a response by itself, so a character whose bytes are in
  two parts is missing from both, and some tokenizers write a space at the start of a text differently.

A tokenizer with a byte-level decoder (Qwen, GLM, Llama 3) decodes in two steps: it joins the bytes of all tokens, and
reads them as UTF-8 with a replacement character for what is no UTF-8. Here both steps are done with one table of the
tokens' bytes, which is checked against the tokenizer when it is made. Other tokenizers decode themselves.

A response that continues keeps its text up to a token that begins a character, because the bytes after it do not
change what was read before. Only the tokens from there on are decoded:

    tokens   │The│ caf│C3│      the text so far is "The caf�", and C3 is the first byte of a character
    tokens   │The│ caf│C3│A9│.│  " caf" begins a character, so "The" stays, and " café." is decoded again
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slime.core.columns import Array
from slime.core.sample import Sample

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

_LOOK_BACK = 16
"""The number of tokens among which one that begins a character is looked for; a character has at most four bytes."""


class TokenText:
    """Decodes the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tables = _byte_tables(tokenizer)

    @property
    def is_byte_level(self) -> bool:
        """Whether tokens are decoded here, and not by the tokenizer."""
        return self._tables is not None

    def decode(self, tokens: Sequence[int] | Array, *, skip_special_tokens: bool) -> str:
        """Return the text of the tokens."""
        if self._tables is not None:
            ids = tokens if isinstance(tokens, np.ndarray) else np.array(tokens, dtype=np.int64)
            table = self._tables[skip_special_tokens]
            if not len(ids):
                return ""
            if ids.min() >= 0 and ids.max() < len(table):
                return _joined(table, ids)
        text = self._tokenizer.decode(
            tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens), skip_special_tokens=skip_special_tokens
        )
        assert isinstance(text, str)
        return text

    def continued(self, text: str, before: Array, tokens: Array, *, skip_special_tokens: bool) -> str:
        """Return the text of `tokens`, the first of which are the tokens `before`, whose text is `text`."""
        begin = self._safe_begin(before, skip_special_tokens)
        if not begin:
            return self.decode(tokens, skip_special_tokens=skip_special_tokens)
        changing = self.decode(before[begin:], skip_special_tokens=skip_special_tokens)
        kept = text[: len(text) - len(changing)]
        return kept + self.decode(tokens[begin:], skip_special_tokens=skip_special_tokens)

    def _safe_begin(self, tokens: Array, skip_special_tokens: bool) -> int:
        """Return the place of one of the last tokens whose first byte begins a character; 0 if none is found."""
        if self._tables is None:
            return 0
        table = self._tables[skip_special_tokens]
        for place in range(len(tokens) - 1, max(0, len(tokens) - _LOOK_BACK), -1):
            token = int(tokens[place])
            own = table[token].as_py() if 0 <= token < len(table) else b""
            if own and own[0] & 0xC0 != 0x80:
                return place
        return 0


def response_text(sample: Sample, decoder: TokenText, tokens_R: Array, *, skip_special_tokens: bool) -> str:
    """Return the text of a response with the tokens `tokens_R`, which begin with the sample's own."""
    known = sample.known_text()
    if known is None:
        return decoder.decode(tokens_R, skip_special_tokens=skip_special_tokens)
    return decoder.continued(known, sample.response_tokens_R, tokens_R, skip_special_tokens=skip_special_tokens)


def _byte_tables(tokenizer: PreTrainedTokenizerBase) -> dict[bool, pyarrow.BinaryArray] | None:
    """Return the bytes of every token, for both values of `skip_special_tokens`; None if bytes alone do not decide."""
    from transformers import PreTrainedTokenizerFast

    kind, inner = type(tokenizer), getattr(tokenizer, "backend_tokenizer", None)
    if inner is None or len(tokenizer) < 1:
        return None
    if any(getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")):
        return None  # code of the model's own
    if tokenizer.clean_up_tokenization_spaces and type(inner.model).__name__ != "BPE":
        return None  # spaces are removed from the text
    decoder: Any = json.loads(inner.to_str()).get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = [inner.id_to_token(number) for number in range(len(tokenizer))]
    own = [b"" if token is None else _bytes_of(token) for token in tokens]
    plain = [b"" if number in special else token for number, token in enumerate(own)]
    import pyarrow  # only for a tokenizer that needs it: the import takes a tenth of a second

    tables = {False: pyarrow.array(own, pyarrow.binary()), True: pyarrow.array(plain, pyarrow.binary())}
    everything = np.arange(len(own))
    for skips, table in tables.items():
        if _joined(table, everything) != tokenizer.decode(everything.tolist(), skip_special_tokens=skips):
            return None
    return tables


def _joined(table: pyarrow.BinaryArray, ids: Array) -> str:
    """Return the text of the bytes of the tokens `ids`, one after the other."""
    import pyarrow

    joined = table.take(pyarrow.array(ids)).buffers()[2]
    return "" if joined is None else joined.to_pybytes().decode("utf-8", errors="replace")


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary (introduced by GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_of_character()


def _bytes_of(token: str) -> bytes:
    """Return a token's bytes; an added token with a character that is no byte's is plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
