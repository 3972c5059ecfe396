"""The state of a data source as a checkpoint has it, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slime.core.sample_columns import from_columns
from slime.megatron.checkpoint.manifest import read_state, write_state
from slime.megatron.checkpoint.state_arrays import put_back, split, write_arrays


def read_whole(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, with the arrays of its state."""
    written = read_state(path)
    put_back(path, written)
    return written


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` after a checkpoint has stored it."""
    with TemporaryDirectory() as directory:
        plain, arrays = split({"state": state})
        write_arrays(Path(directory), arrays)
        write_state(Path(directory), plain, {})
        return read_whole(Path(directory))["state"]


def as_lists(state: Any) -> Any:
    """Return `state` with its columns of samples as lists of groups of dicts (`Sample.to_dict`)."""
    if isinstance(state, dict) and "group_sizes" in state:
        return [[sample.to_dict() for sample in group] for group in from_columns(state)]
    return {key: as_lists(value) for key, value in state.items()} if isinstance(state, dict) else state


def as_json(state: dict[str, Any]) -> dict[str, Any]:
    """Return `as_lists` of the state after it was written as JSON and read, so that it shares nothing."""
    return json.loads(json.dumps(as_lists(state)))
