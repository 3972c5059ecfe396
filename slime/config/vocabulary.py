"""Vocabulary: which token has which number, read from a tokenizer's files without transformers.

Path: rules compare the vocabularies of two directories, and a rollout dump names the one that it was made with.
Invariant: two directories that give every token the same number have one vocabulary, however their files are laid out.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from slime.core.small_files import MAX_JSON, is_file, read_small

OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
"""Where there is no tokenizer.json, the first of these has the vocabulary."""


def vocabulary_text(file: Path) -> str:
    """The token numbers of a tokenizer.json in one text; the whole file where it is laid out otherwise."""
    text = _content(file).decode(errors="replace")
    try:
        found = json.loads(text)
        added = [(token["id"], token["content"]) for token in found.get("added_tokens", [])]
        return json.dumps([found["model"]["vocab"], sorted(added)], sort_keys=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


@cache
def vocabulary_digest(directory: str) -> str | None:
    """A digest of the vocabulary in an HF directory; None where it has no tokenizer."""
    folder = Path(directory)
    file = folder / "tokenizer.json"
    if is_file(file):
        return _digest(vocabulary_text(file).encode())
    others = [folder / name for name in OTHER_FILES if is_file(folder / name)]
    return _digest(_content(others[0])) if others else None


def _content(file: Path) -> bytes:
    """A file's content; the name of one that cannot be read, which is another than any that can."""
    try:
        return read_small(file, MAX_JSON)
    except (OSError, ValueError):
        return str(file).encode()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
