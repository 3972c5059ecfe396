"""The identity of a Hugging Face directory to a run: tokenizer, chat template and the content of config.json.

- Used by: the trainer, which stores it in each checkpoint and compares it when a run is resumed.
- Invariant: it changes exactly when a run would read something else, and not with the layout of the files (key order,
  white space, the version of transformers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

CONFIG = "config.json"
TOKENIZER, TEMPLATE = "tokenizer", "chat template"
_MISSING = "nothing"
_MAX_SHOWN = 60

_NOT_CONTENT = frozenset(
    {
        # the writer of the file, and the dtype of the stored weights
        *("_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype", "use_cache"),
        *("_attn_implementation", "_attn_implementation_autoset", "architectures", "auto_map"),
    }
)
_NOT_TOKENIZER = frozenset(
    {
        *("name_or_path", "transformers_version", "_commit_hash", "tokenizer_file", "auto_map", "processor_class"),
        *("backend", "is_local", "local_files_only", "chat_template", "tokenizer_class", "padding", "truncation"),
    }
)


def hf_identity(directory: str | Path) -> dict[str, Any]:
    """Return config.json's content and digests of tokenizer and chat template, as plain JSON types.

    Raises:
        ValueError: one of these files cannot be read; the message names the file.
    """
    root = Path(directory)
    settings = _json(root / "tokenizer_config.json")
    return {
        CONFIG: _without(_json(root / CONFIG), _NOT_CONTENT),
        TOKENIZER: _digest([*_vocabulary(root), _canonical(_without(settings, _NOT_TOKENIZER))]),
        TEMPLATE: _digest([_chat_template(root, settings)]),
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences in words; an empty list if there are none."""
    found = [f"another {what}" for what in (TOKENIZER, TEMPLATE) if then.get(what) != now.get(what)]
    before, here = (cast(dict[str, Any], each.get(CONFIG) or {}) for each in (then, now))
    for key in sorted({*before, *here}):
        values = [_shown(each[key]) if key in each else _MISSING for each in (before, here)]
        if _canonical(before.get(key, _MISSING)) != _canonical(here.get(key, _MISSING)):
            found.append(f"{CONFIG}: {key} {values[0]} then, {values[1]} now")
    return found


def _vocabulary(root: Path) -> Iterator[bytes]:
    """Yield tokenizer.json, which has everything; without it, the files that slow tokenizers read."""
    if (root / "tokenizer.json").is_file():
        yield _canonical(_without(_json(root / "tokenizer.json"), _NOT_TOKENIZER))
        return
    for name in ("tokenizer.model", "merges.txt", "vocab.txt"):
        yield _bytes(root / name)
    for name in ("vocab.json", "added_tokens.json", "special_tokens_map.json"):
        yield _canonical(_json(root / name))


def _chat_template(root: Path, settings: Mapping[str, Any]) -> bytes:
    """Return the template that is rendered, whichever file has it."""
    file = root / "chat_template.jinja"
    if file.is_file():
        return _canonical(_bytes(file).decode(errors="replace"))
    of_file = _json(root / "chat_template.json").get("chat_template")
    return _canonical(settings.get("chat_template") if of_file is None else of_file)


def _without(data: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def _canonical(value: Any) -> bytes:
    """Return the same bytes for the same JSON, whatever its layout."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(parts: list[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def _json(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no file."""
    data = _bytes(file)
    try:
        value: Any = json.loads(data) if data else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} cannot be read (it holds no JSON object)")
    return cast(dict[str, Any], value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
