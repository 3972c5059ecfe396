"""The tokenizer of `--hf-checkpoint`, and the two ways to turn a prompt into tokens.

- Called by: the rollout manager loads it once. Prompts are tokenized here when their file is loaded. Responses never
  are, because tokens go into the engine and come out of it as they are.
- Invariant: the text of a chat template is tokenized without special tokens, because the template has written them
  itself. A plain text gets the special tokens that begin a text (BOS) once, and none that end one (EOS), because the
  response continues it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime.config.architecture import hf_architecture
from slime.config.args import Args
from slime.core.imports import importing
from slime.models.families import FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(args: Args) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template.

    Raises:
        ValueError: --hf-checkpoint is missing or holds no tokenizer.
    """
    path = args.hf_checkpoint
    if path is None:
        raise ValueError("--hf-checkpoint: not given; prompts cannot be tokenized; name a Hugging Face directory")
    try:
        with importing():
            return _loader(Path(path)).from_pretrained(path, trust_remote_code=args.hf_trust_remote_code)
    except Exception as error:  # for a file of unexpected content transformers raises whatever its code runs into
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"--hf-checkpoint {path}: no tokenizer can be loaded from it: {kind}{error}") from error


def _loader(path: Path) -> Any:
    """Return AutoTokenizer, or the class that it would choose, if that can be only one.

    An import of AutoTokenizer includes PyTorch's compiler, which takes two seconds of every start.
    """
    if _has_plain_tokenizer(path):
        from transformers import PreTrainedTokenizerFast as Loader
    else:
        from transformers import AutoTokenizer as Loader
    return Loader


def _has_plain_tokenizer(path: Path) -> bool:
    """Return whether the tokenizer is of transformers' general class; False if the files are not as expected."""
    try:
        config, tokenizer = (json.loads((path / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
        family = FAMILIES[hf_architecture(config).family]
        return family.plain_tokenizer and "auto_map" not in tokenizer and (path / "tokenizer.json").is_file()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # AutoTokenizer says what is wrong


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, chat_template: bool
) -> list[list[int]]:
    """Return the token ids of prompts: texts that the chat template has rendered, or plain ones."""
    if chat_template:
        return tokenize(tokenizer, texts, add_special_tokens=False)
    return tokenize_texts(tokenizer, texts)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the token ids of each text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def offset_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the token ids of each text without special tokens, and the characters `[low, high)` of each token.

    The ranges leave no gap: a space that a tokenizer leaves out of a token's range belongs to the token after it.

    Raises:
        ValueError: the tokenizer is not one of the `tokenizers` library, which alone knows the places of tokens.
    """
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ValueError(
            f"--hf-checkpoint {tokenizer.name_or_path}: its tokenizer does not report the places of tokens, which "
            "conversations require; take a directory with a tokenizer.json"
        ) from error
    found: list[tuple[list[int], list[tuple[int, int]]]] = []
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ranges: list[tuple[int, int]] = []
        end = 0
        for low, high in offsets:
            ranges.append((min(low, end), high))
            end = max(end, high)
        found.append((list(ids), ranges))
    return found


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that a response continues, each after the special tokens that begin a text.

    A text that brings these tokens itself does not get them twice. With a tokenizer that writes `<s>` and `</s>` around
    a text, `"a"` and `"<s>a"` both become `<s> a`.
    """
    plain = tokenize(tokenizer, texts, add_special_tokens=False)
    beginning = _beginning(tokenizer, texts, plain)
    return [beginning[: len(beginning) - _overlap(beginning, ids)] + ids for ids in plain]


def _beginning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plain: Sequence[list[int]]) -> list[int]:
    """Return the special tokens before a text's own, as the tokenizer adds them to the shortest of these texts."""
    ids, text = min(((ids, text) for ids, text in zip(plain, texts, strict=True) if ids), default=([], ""), key=_length)
    [whole] = tokenize(tokenizer, [text], add_special_tokens=True)
    places = [place for place in range(len(whole) - len(ids) + 1) if whole[place : place + len(ids)] == ids]
    return whole[: places[-1]] if ids and places else []


def _length(pair: tuple[list[int], str]) -> int:
    return len(pair[0])


def _overlap(beginning: list[int], ids: list[int]) -> int:
    """Return how many of the last tokens of `beginning` the text itself begins with."""
    return max(count for count in range(len(beginning) + 1) if ids[:count] == beginning[len(beginning) - count :])
