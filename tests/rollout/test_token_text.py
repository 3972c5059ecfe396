"""The text of tokens: as the tokenizer decodes them, for whole responses and for those that continue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from slime.core.sample import Sample
from slime.rollout import token_text
from slime.rollout.token_text import TokenText, response_text

CHARACTER_OF = {byte: character for character, byte in token_text._BYTE_OF.items()}  # pyright: ignore


def byte_level(decoder: Any = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, some of several bytes, and added tokens."""
    texts = ["The", " caf", "é", "汉", "\U0001f600", "ab\n", "�"]
    words = [bytes([byte]) for byte in range(256)] + [text.encode() for text in texts] + ["汉字".encode()[1:5]]
    vocabulary = {"".join(CHARACTER_OF[byte] for byte in word): place for place, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.ByteLevel() if decoder is None else decoder
    inner.add_special_tokens(["<end>", AddedToken("<汉>")])
    inner.add_tokens(["<tool>", "é!", "two words"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


TOKENIZER = byte_level()
TEXT = TokenText(TOKENIZER)
UTF8 = [byte for word in ("é", "汉", "\U0001f600", "a") for byte in word.encode()]
tokens = st.lists(st.integers(0, len(TOKENIZER) - 1) | st.sampled_from(UTF8), max_size=40)


@settings(deadline=None, max_examples=300)
@given(tokens, st.booleans())
def test_the_text_is_the_tokenizers(ids: list[int], skips: bool) -> None:
    assert TEXT.is_byte_level
    assert TEXT.decode(ids, skip_special_tokens=skips) == TOKENIZER.decode(ids, skip_special_tokens=skips)
    assert TEXT.decode(np.array(ids, np.int32), skip_special_tokens=skips) == TEXT.decode(
        ids, skip_special_tokens=skips
    )


@settings(deadline=None, max_examples=300)
@given(st.lists(tokens, min_size=1, max_size=5), st.booleans())
def test_parts_give_the_text_of_the_whole(parts: list[list[int]], skips: bool) -> None:
    sample = Sample(tokens=[1, 2], prompt_length=2)
    for part in parts:
        tokens_T = np.append(sample.tokens_T, np.array(part, np.int32))
        text = response_text(sample, TEXT, tokens_T[2:], skip_special_tokens=skips)
        sample.set_arrays(tokens=tokens_T)
        sample.set_text(text)
        assert text == TOKENIZER.decode(tokens_T[2:].tolist(), skip_special_tokens=skips)


class Counting(TokenText):
    """Counts the tokens that are decoded."""

    count = 0

    def decode(self, tokens: Any, *, skip_special_tokens: bool) -> str:
        self.count += len(tokens)
        return super().decode(tokens, skip_special_tokens=skip_special_tokens)


def test_a_long_response_is_decoded_once() -> None:
    decoder, sample = Counting(TOKENIZER), Sample()
    for _ in range(50):
        tokens_T = np.append(sample.tokens_T, np.array([256, 257, 258, *"汉".encode(), 262] * 10, np.int32))
        text = response_text(sample, decoder, tokens_T, skip_special_tokens=False)
        sample.set_arrays(tokens=tokens_T)
        sample.set_text(text)
    assert sample.response == "The café汉�" * 500
    assert len(sample.tokens_T) < decoder.count < 1.1 * len(sample.tokens_T)


def test_a_changed_text_is_decoded_whole() -> None:
    sample = Sample()
    sample.set_arrays(tokens=np.array([256, 257], np.int32))
    sample.set_text("The caf")
    after = np.array([256, 257, 258], np.int32)
    assert response_text(sample, TEXT, after, skip_special_tokens=False) == "The café"
    sample.response = "something else"
    assert response_text(sample, TEXT, after, skip_special_tokens=False) == "The café"


@pytest.mark.parametrize("decoder", [decoders.Fuse(), decoders.Metaspace(), decoders.Sequence([decoders.ByteLevel()])])
def test_other_tokenizers_decode_themselves(decoder: Any) -> None:
    tokenizer = byte_level(decoder)
    text = TokenText(tokenizer)
    ids = [256, 257, 0xC3, 0xA9, len(tokenizer) - 1]
    assert not text.is_byte_level
    assert text.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
    before = np.array(ids[:3])
    assert text.continued("wrong", before, np.array(ids), skip_special_tokens=False) == tokenizer.decode(ids)


def test_ids_outside_the_vocabulary_are_the_tokenizers() -> None:
    ids = [256, len(TOKENIZER) + 5, 257]
    assert TEXT.decode(ids, skip_special_tokens=False) == TOKENIZER.decode(ids) == "The caf"
    with pytest.raises(OverflowError):
        TEXT.decode([-1], skip_special_tokens=False)


def test_a_table_that_decodes_differently_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_text._BYTE_OF, "a", ord("b"))  # pyright: ignore[reportPrivateUsage]
    assert not TokenText(TOKENIZER).is_byte_level
