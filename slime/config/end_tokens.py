"""The token ids that end a model's text, read from its HF directory.

- Used by: the rules, which check them; the embedded engine, which stops at them; `rollout`, which recognizes a response
  that ends in one.
- Invariant: engine and rollout read the same set. If only one of them knew an id, a response could continue after its
  end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from slime.core import small_files

END_OF_MESSAGE = "<|eom_id|>"
"""The token at which SGLang also stops if the tokenizer has it (Llama 3.1 ends a tool call with it)."""


def end_token_ids(directory: str | Path) -> frozenset[int]:
    """Return the ids in `eos_token_id` of config.json and generation_config.json, an integer or a list in each.

    Raises:
        OSError: a file exists but cannot be read.
        ValueError: a file is not a JSON object, or its `eos_token_id` has another type.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = read_json_object(Path(directory) / name).get("eos_token_id")
        ids = cast(list[Any], value) if isinstance(value, list) else [] if value is None else [value]
        for number in ids:
            if not isinstance(number, int) or isinstance(number, bool):
                raise ValueError(f"{name}: eos_token_id is {value!r}; it must be an integer or a list of integers")
            found.add(number)
    return frozenset(found)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, or return an empty one if there is no file. Raises ValueError with the file's name."""
    if not os.path.lexists(path):
        return {}
    try:
        return small_files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read (it {error})") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
