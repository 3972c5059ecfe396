"""The files that --prompt-data and the evaluation sets name: lists, patterns and slices.

- Used by: the rules, the plan, and `rollout.prompts`, which all see the same files in the same order.
- Invariant: the order is that of the words; the matches of a pattern are sorted by name.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from itertools import islice

from slime.config.data_files import SUFFIXES, split_slice
from slime.config.data_rows import DataError

_FOLDERS = 100
"""The number of folders in which the remedy for a directory looks for data files."""
_ANYWHERE = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::.*)?")
_WEIGHTED = re.compile(r"(.*\.(?:jsonl|json|parquet)(?:@\[.*\])?):[0-9.]+", re.DOTALL)


def data_words(data: str | Sequence[str]) -> list[str]:
    """Return the words of --prompt-data or of an evaluation set, which holds a single text if there is only one."""
    return [data] if isinstance(data, str) else list(data)


def data_paths(words: str | Sequence[str]) -> list[str]:
    """Return the path of each file, with its slice: `["data/*.jsonl@[:9]"]` -> `["data/a.jsonl@[:9]", ...]`.

    The slice applies to each match of a pattern. A file whose name holds a `*`, `?` or `[` is found by its name.

    Raises:
        DataError: a word is a directory, the id of a data set on the hub, or a pattern without matches.
        ValueError: a slice cannot be read.
    """
    paths: list[str] = []
    for word in data_words(words):
        file, _ = split_slice(word)
        part = word[len(file) :]
        if _ANYWHERE.search(file) is None or os.path.lexists(file):
            matches = [file]
        else:
            matches = sorted(match for match in glob.glob(file, recursive=True) if not os.path.isdir(match))
        if not matches:
            raise DataError(file, "no file matches this pattern", "correct it; ** matches folders of any depth")
        if (fault := _not_a_file(matches[0])) is not None:
            raise fault
        paths += [f"{match}{part}" for match in matches]
    return paths


def _not_a_file(file: str) -> DataError | None:
    """Return the error of a word that cannot name a file; a missing file is no error here."""
    if os.path.isdir(file):
        kinds = sorted(
            {
                suffix
                for _, _, names in islice(os.walk(file), _FOLDERS)
                for suffix in SUFFIXES
                if _any_ends(names, suffix)
            }
        )
        example = os.path.join(file, "**", f"*{(kinds or SUFFIXES)[-1]}")
        return DataError(file, "is a directory", f"name its files, for example with the pattern '{example}'")
    if os.path.lexists(file):
        return None
    if (weighted := _WEIGHTED.fullmatch(file)) is not None:
        rule = "there is no such file, and weights have a flag of their own"
        return DataError(file, rule, f"write {weighted[1]}, and the weights of all files after --prompt-data-weights")
    hub_id = _HUB_ID.fullmatch(file)
    if hub_id is not None and not file.endswith(SUFFIXES):
        name = hub_id[1]
        folder = name.partition("/")[2]
        download = f"hf download --repo-type dataset {name} --local-dir {folder}"
        remedy = f"{download}, then name its files, such as '{folder}/**/train*.parquet'"
        return DataError(file, "there is no such file, and data sets are not downloaded from the hub", remedy)
    return None


def _any_ends(names: Sequence[str], suffix: str) -> bool:
    return any(name.endswith(suffix) for name in names)
