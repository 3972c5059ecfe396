"""The token ids with which a model ends a text, from its HF directory.

Path: the rules check them, the embedded engine stops at them, and `rollout` recognises a response that ends in one.
Invariant: an engine and the rollout read the same set: an id that only one of them knows would let a response go on
after its end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from slime.core import small_files

END_OF_MESSAGE = "<|eom_id|>"
"""SGLang also stops at this token, where a tokenizer has it (Llama 3.1 closes a tool call with it)."""


def end_token_ids(directory: str | Path) -> frozenset[int]:
    """`eos_token_id` of config.json and of generation_config.json; each is an integer or a list of integers.

    Raises:
        OSError: a file is there and cannot be read.
        ValueError: a file is no JSON object, or its `eos_token_id` is something else.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = read_json_object(Path(directory) / name).get("eos_token_id")
        ids = cast(list[Any], value) if isinstance(value, list) else [] if value is None else [value]
        for number in ids:
            if not isinstance(number, int) or isinstance(number, bool):
                raise ValueError(f"{name}: eos_token_id is {value!r}; it has to be an integer or a list of integers")
            found.add(number)
    return frozenset(found)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file. Raises OSError, ValueError with the file's name."""
    if not os.path.lexists(path):
        return {}
    try:
        return small_files.read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read (it {error})") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
