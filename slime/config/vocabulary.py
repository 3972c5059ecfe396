"""The vocabulary of a tokenizer (the id of each token), read from its files without transformers.

- Used by: rules, which compare the vocabularies of two directories; rollout dumps, which record theirs.
- Invariant: two directories that give every token the same id have equal vocabularies, whatever the format of their
  JSON.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from slime.core.small_files import MAX_JSON, is_file, read_small

OTHER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
"""Files that may have the vocabulary if there is no tokenizer.json; the first existing one is used."""


def vocabulary_text(file: Path) -> str:
    """Return the token ids of a tokenizer.json as one text, or the whole file if it has another structure."""
    text = _content(file).decode(errors="replace")
    try:
        found = json.loads(text)
        added = [(token["id"], token["content"]) for token in found.get("added_tokens", [])]
        return json.dumps([found["model"]["vocab"], sorted(added)], sort_keys=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


@cache
def vocabulary_digest(directory: str) -> str | None:
    """Return a digest of the vocabulary in an HF directory, or None if it has no tokenizer."""
    folder = Path(directory)
    file = folder / "tokenizer.json"
    if is_file(file):
        return _digest(vocabulary_text(file).encode())
    others = [folder / name for name in OTHER_FILES if is_file(folder / name)]
    return _digest(_content(others[0])) if others else None


def _content(file: Path) -> bytes:
    """Return a file's content, or its path if it cannot be read, so that it differs from every readable one."""
    try:
        return read_small(file, MAX_JSON)
    except (OSError, ValueError):
        return str(file).encode()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
