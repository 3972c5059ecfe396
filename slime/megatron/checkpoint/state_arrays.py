"""The arrays in the state of a checkpoint: a safetensors file next to the JSON that holds all else.

- Used by: `save_load` on rank 0, which takes the arrays out of the state when it saves, and puts them back.
- Invariant: the file is one of those whose size and digest the manifest holds, so it is judged like the weights. It is
  plain numbers: nothing in it can be run.

The name of an array is its path in the state: the JSON {"a": {"b": {}}} with an array `a/b/tokens` was
{"a": {"b": {"tokens": array}}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slime.core.columns import Array
from slime.megatron.checkpoint.manifest import STATE_FILE, sizes

ARRAYS_FILE = "slime_state.safetensors"


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return `state` without the arrays in its dicts, and these arrays by their paths.

    Raises:
        TypeError: the keys above an array are not texts without a slash, or its dtype is not one of numbers.
    """
    arrays: dict[str, Array] = {}
    return _without_arrays(state, (), arrays), arrays


def _without_arrays(state: Mapping[Any, Any], path: tuple[Any, ...], arrays: dict[str, Array]) -> dict[Any, Any]:
    plain: dict[Any, Any] = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            array = cast(Array, value)
            keys = (*path, key)
            if not all(isinstance(each, str) and "/" not in each for each in keys) or array.dtype.kind not in "biuf":
                raise TypeError(f"an array of {array.dtype} under the keys {keys} cannot be stored")
            arrays["/".join(keys)] = array
        else:
            plain[key] = _without_arrays(value, (*path, key), arrays) if isinstance(value, dict) else value
    return plain


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the arrays into the checkpoint `path`; no file if there are none.

    Raises:
        OSError: they cannot be written.
    """
    if not arrays:
        return
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path / ARRAYS_FILE)
    except SafetensorError as error:
        raise OSError(f"{path / ARRAYS_FILE}: {error}") from error


def read_arrays(path: Path) -> dict[str, Array]:
    """Return what `write_arrays` wrote into the checkpoint `path`.

    Raises:
        ValueError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path / ARRAYS_FILE, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two: dtypes that numpy does not have
        raise ValueError(f"{path / ARRAYS_FILE} is damaged: {error}") from error


def put_back(path: Path, written: dict[str, Any]) -> None:
    """Put the arrays of the checkpoint `path` back into what `manifest.read_state` returned.

    Raises:
        ValueError: the file is damaged, or the state has no place for an array.
        OSError: it cannot be read.
    """
    arrays = read_arrays(path) if ARRAYS_FILE in sizes(written) else {}
    for name, array in arrays.items():
        *above, key = name.split("/")
        place: Any = written
        for each in above:
            place = place.get(each) if isinstance(place, dict) else None
        if not isinstance(place, dict) or key in place:
            raise ValueError(f"{path / ARRAYS_FILE} holds {name}, for which {STATE_FILE} has no place")
        place[key] = array
