"""The arrays of a checkpoint's state: they come back exactly, and a file that was made up is a clear error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.megatron.checkpoint.manifest import read_state, write_state
from slime.megatron.checkpoint.state_arrays import ARRAYS_FILE, put_back, read_arrays, split, write_arrays

OLD = Path(__file__).parents[1] / "core" / "state_of_format_2.json"
DTYPES = ["?", "u1", "i1", "i2", "i4", "i8", "f4", "f8"]


def stored(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    plain, arrays = split(state)
    write_arrays(path, arrays)
    write_state(path, plain, {})
    written = read_state(path)
    put_back(path, written)
    return written


def test_arrays_come_back_exactly(tmp_path: Path) -> None:
    arrays = {dtype: np.arange(-3, 3).astype(dtype) for dtype in DTYPES}
    odd = np.array([np.nan, -0.0, np.inf, 5e-324])
    state = {"a": {**arrays, "matrix": np.arange(6).reshape(2, 3).T, "none": np.zeros(0), "plain": [1]}, "odd": odd}
    back = stored(tmp_path, state)
    for name, array in state["a"].items():
        if name != "plain":
            assert (back["a"][name].dtype, back["a"][name].shape) == (array.dtype, array.shape)
            assert back["a"][name].tobytes() == array.tobytes()
    assert back["odd"].tobytes() == odd.tobytes() and back["a"]["plain"] == [1]
    assert "odd" in state and "matrix" in state["a"], "the state that was given is unchanged"


def test_a_state_without_arrays_needs_no_file(tmp_path: Path) -> None:
    assert stored(tmp_path, {"a": {"b": {}}})["a"] == {"b": {}}
    assert not (tmp_path / ARRAYS_FILE).exists()


@pytest.mark.parametrize(
    "state",
    [
        {"a": np.array([object()])},
        {"a": np.array(["text"])},
        {"a": np.array([1 + 2j])},
        {"a/b": np.zeros(1)},
        {"a": {1: np.zeros(1)}},
    ],
)
def test_other_arrays_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        stored(tmp_path, state)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="not JSON serializable"):
        stored(tmp_path, {"a": [np.zeros(1)]})


def file_of(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        pickle.dumps({"a": [1]}),
        file_of({"state/a": ENTRY}),
        file_of({"state/a": {**ENTRY, "shape": [2**62]}}, bytes(8)),
        file_of({"state/a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
        file_of({"state/a": {**ENTRY, "dtype": "O"}}, bytes(8)),
        file_of({"state/a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, bytes(8)),
    ],
)
def test_made_up_files_are_clear_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ARRAYS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{ARRAYS_FILE} is damaged"):
        read_arrays(tmp_path)
    (tmp_path / ARRAYS_FILE).write_bytes(file_of({"state/a": ENTRY}, bytes(8)))
    assert read_arrays(tmp_path)["state/a"].tolist() == [0], "control"


@pytest.mark.parametrize("name", ["elsewhere/a", "state/list/0", "state/taken", "format"])
def test_an_array_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    written = {"state": {"list": [1], "taken": 1}, "file_sizes": {ARRAYS_FILE: 1}, "format": 3}
    (tmp_path / ARRAYS_FILE).write_bytes(file_of({name: ENTRY}, bytes(8)))
    with pytest.raises(ValueError, match=r"for which slime_state\.json has no place"):
        put_back(tmp_path, written)


def test_the_manifest_of_format_2_is_read(tmp_path: Path) -> None:
    """The version before wrote this file; `core/test_sample_columns` compares its samples."""
    (tmp_path / "slime_state.json").write_bytes(OLD.read_bytes())
    written = read_state(tmp_path)
    put_back(tmp_path, written)
    assert written["format"] == 2 and written["state"] == json.loads(OLD.read_text())["state"]
