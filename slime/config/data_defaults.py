"""The keys and the form of the prompts, for flags that are not given: what the first row of --prompt-data shows.

- Used by: `resolve`.
- Invariant: a flag that is given is never replaced. Rows that do not fit what the first one shows are refused later, by
  the check of every row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, cast

from slime.config.args import INPUT_KEY, Args
from slime.config.data_files import read_rows, split_slice
from slime.config.data_paths import data_paths
from slime.config.data_rows import MISSING, DataKeys, Row, find, is_text_or_number
from slime.config.reward_types import may_have_label, needs_label
from slime.core.small_files import is_file

INPUT_KEYS = (INPUT_KEY, "messages", "question", "problem")
"""The names under which data sets have the prompt, the most usual first."""
LABEL_KEYS = ("label", "answer", "solution", "ground_truth", "reward_model.ground_truth")
"""The names under which data sets have the label, the most usual first."""


def data_defaults(args: Args) -> dict[str, Any]:
    """Return the defaults of --input-key, --label-key and --apply-chat-template; a flag that is given has none."""
    row = _first_row(args)
    changes: dict[str, Any] = {}
    key = args.input_key
    if key is None:
        supervised = args.loss_type == "sft_loss"
        key = next((name for name in INPUT_KEYS if row is not None and _is_prompt(row, name, supervised)), INPUT_KEY)
        changes["input_key"] = key
    if args.apply_chat_template is None:
        changes["apply_chat_template"] = row is not None and isinstance(find(row, key), list)
    labelled = may_have_label(args.rm_type) or args.custom_rm_path is not None
    if args.label_key is None and labelled and args.loss_type != "sft_loss":
        found = [name for name in LABEL_KEYS if row is not None and is_text_or_number(find(row, name))]
        fallback = LABEL_KEYS[0] if needs_label(args.rm_type) and args.custom_rm_path is None else None
        changes["label_key"] = next(iter(found), fallback)
    return changes


def _is_prompt(row: Mapping[str, Any], key: str, supervised: bool) -> bool:
    """Return whether the row has a prompt under `key`. For a policy, a conversation must not end with an answer."""
    value = find(row, key)
    if not isinstance(value, list) or not value or supervised or key == INPUT_KEY:
        return value is not MISSING
    last = cast(list[Any], value)[-1]
    return not (isinstance(last, dict) and cast(dict[str, Any], last).get("role") == "assistant")


def _first_row(args: Args) -> Mapping[str, Any] | None:
    """Return the first row of --prompt-data; None if there is none on this machine, which another rule reports."""
    if args.prompt_data is None or args.has_own_data_source:
        return None
    try:
        path = data_paths(args.prompt_data)[0]
        file = split_slice(path)[0]
        if not is_file(file):
            return None
        state = os.stat(file)
    except (OSError, ValueError):
        return None
    return _read_first(path, args.input_key, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _read_first(path: str, input_key: str | None, changed: int, size: int) -> Mapping[str, Any] | None:
    """Return the first row. A parquet file is read only with the key of a column that it has."""
    for key in INPUT_KEYS if input_key is None else (input_key,):
        keys = DataKeys(input_key=key, label_key=None, metadata_key="metadata", tool_key=None)
        try:
            for row in islice(read_rows(path, keys), 1):
                return row.data if isinstance(row, Row) else None
        except ValueError:  # no such column, or a fault of the file, which the check of every row reports
            continue
    return None
