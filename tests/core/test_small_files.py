"""Reads end, whatever the name refers to, and the message completes "FILE ..."."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slime.core.small_files import is_directory, is_file, open_regular, read_json_object, read_small


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"is larger than .* MiB"):
        read_small(path, 4)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "none", 5)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """A pipe without a writer would otherwise block for ever, and /dev/zero would never end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises((ValueError, OSError), match=r"not a regular file|directory"):
            open_regular(path)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(pipe)
    assert set(os.listdir("/proc/self/fd")) == before, "a refused file is closed again"


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file") and not is_directory(tmp_path / "file")
    assert is_directory(tmp_path) and not is_file(tmp_path)
    for name in ("x" * 10_000, "a\0b", ""):
        assert not is_file(name) and not is_directory(name)


def test_a_json_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    longest = "1" * 100
    path.write_text(f'\ufeff{{"a": 1, "b": {{"c": {longest}}}}}', encoding="utf-8")
    assert read_json_object(path) == {"a": 1, "b": {"c": int(longest)}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice in one object"),
        (b'{"b": {"a": 1, "a": 1}}', "has the key 'a' twice in one object"),
        (b'{"a": "\xff"}', r"is not text in UTF-8 \(byte 7\)"),
        (b'{"a": ' + b"9" * 101 + b"}", "has a number of 101 digits"),
        (b'{"a": ' + b"[" * 200_000, "is nested too deeply|is not JSON"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "is larger than"),
    ],
)
def test_bad_json_is_refused_with_its_reason(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json_object(path, limit=1000 if b"x" in content else 10**6)
