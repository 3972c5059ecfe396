"""The manifest of a checkpoint: sizes and digests of all other files, and the state of the run without its arrays.

- Used by: `save_load` writes it last, after the weights; `files` and `save_load` compare files with it.
- Invariant: it holds a digest of itself, so a change of it is noticed as well.

A file's digest is xxh3-128 over all its bytes. It finds every kind of accident (flipped bits, lost or exchanged
blocks). It gives no protection against somebody who writes a file on purpose; that is the task of `safe_pickle`.

    format 1   sums of blocks, whose changes can cancel each other; still read, with its own check
    format 2   xxh3-128; still read
    format 3   the arrays in the state have a file of their own (`state_arrays`)
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import slime

STATE_FILE = "slime_state.json"
FORMAT = 3
PARTS = "parts"
_FORMAT, _WRITER = "format", "slime_version"
_SIZES, _DIGESTS, _OWN_DIGEST = "file_sizes", "file_digests", "checksum"
_OLD_DIGESTS, _OLD_BLOCK = "file_checksums", 2**20
_READ_AT_ONCE = 2**24
_THREADS = 4


class NewerFormatError(ValueError):
    """Raised if a later version of slime wrote the checkpoint, which is not damaged."""


def read_state(path: Path) -> dict[str, Any]:
    """Return what `write_state` wrote into the checkpoint `path`.

    Raises:
        NewerFormatError: this version cannot read it (a ValueError, too).
        ValueError: it is not what was written.
        OSError: it cannot be read.
    """
    try:
        written = json.loads((path / STATE_FILE).read_bytes())
    except RecursionError as error:
        raise ValueError("not the bytes that were written") from error
    if not isinstance(written, dict):
        raise ValueError("not the bytes that were written")
    if _OWN_DIGEST not in written:
        raise ValueError("it has no checksum; earlier versions of slime wrote none")
    own = written.pop(_OWN_DIGEST)
    if own != (_digest_of(written) if _FORMAT in written else zlib.crc32(json.dumps(written).encode())):
        raise ValueError("not the bytes that were written")
    if written.get(_FORMAT, 1) > FORMAT:
        raise NewerFormatError(
            f"{path}: has format {written[_FORMAT]}, and this version of slime ({slime.__version__}) reads up to "
            f"{FORMAT}; load it with slime {written.get(_WRITER)}, which wrote it"
        )
    return written


def write_state(path: Path, header: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write `header` with the sizes and digests of all other files of the checkpoint `path`."""
    sizes = {file.name: file.stat().st_size for file in sorted(_filled_files(path))}
    state = {**header, _FORMAT: FORMAT, _WRITER: slime.__version__, _SIZES: sizes, _DIGESTS: dict(digests)}
    (path / STATE_FILE).write_text(sealed(state))


def sealed(state: Mapping[str, Any]) -> str:
    """Return `state` as JSON, with a digest of itself."""
    return json.dumps({**state, _OWN_DIGEST: _digest_of(state)})


def _digest_of(state: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(state).encode())


def _filled_files(path: Path) -> list[Path]:
    """List the files that are not empty: a rank that has nothing to write leaves an empty one."""
    return [file for file in path.iterdir() if file.is_file() and file.stat().st_size]


def digests_of_small_files(path: Path) -> dict[str, str]:
    """Return the digests, by name, of the files that no rank's writer has digested: those that rank 0 writes."""
    return {file.name: digest(file) for file in _filled_files(path) if re.match(r"__\d+_", file.name) is None}


def sizes(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of each file in bytes, from what `read_state` returned."""
    return state.get(_SIZES, {})


def written_files(path: Path) -> list[str]:
    """Return the names of all files with a digest; an empty list if the checkpoint is Megatron's own."""
    if not (path / STATE_FILE).is_file():
        return []
    state = read_state(path)
    return sorted(state.get(_DIGESTS) or state[_OLD_DIGESTS])


def changed_files(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Return those of `names` that no longer hold what was written, and why; several files are read at once.

    Raises:
        OSError, ValueError: the checkpoint's state file cannot be read.
    """
    if not names:
        return {}
    state = read_state(path)
    of_file, expected = (digest, state[_DIGESTS]) if _DIGESTS in state else (_sum_of, state[_OLD_DIGESTS])

    def problem(name: str) -> str | None:
        try:
            found: Any = of_file(path / name)
        except (OSError, ValueError) as error:  # ValueError: an empty file has no memory map
            return f"cannot be read ({error})"
        return None if found == expected.get(name) else "not the bytes that were written"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        problems = dict(zip(names, threads.map(problem, names), strict=True))
    return {name: why for name, why in problems.items() if why is not None}


def digest(file: Path) -> str:
    """Return the xxh3-128 of all bytes, in hexadecimal digits."""
    found = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_READ_AT_ONCE):
            found.update(block)
    return found.hexdigest()


def _sum_of(file: Path) -> int:
    """Return the checksum of format 1: the CRC of the sums of a file's blocks."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    whole = len(data) // _OLD_BLOCK * _OLD_BLOCK
    sums = data[:whole].view(np.uint64).reshape(-1, _OLD_BLOCK // 8).sum(axis=1)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))
