"""Rollout dumps: the samples of one rollout in a file, for replaying training alone.

Path: written by `--save-debug-rollout-data`, read by `--load-debug-rollout-data`. Invariant: JSON keeps every token,
log-prob and reward exactly, so a replay trains on the same numbers bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path

from slime.core.sample import Sample


def write_dump(path: Path, groups: list[list[Sample]]) -> None:
    """One JSON line a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for group in groups:
            file.write(json.dumps([sample.to_dict() for sample in group]) + "\n")


def read_dump(path: Path) -> list[list[Sample]]:
    """The groups, in order.

    Raises:
        ValueError: the file is missing or a line of it is not a dumped group.
    """
    if not path.is_file():
        raise ValueError(
            f"--load-debug-rollout-data {path}: no such file; it has to be one that --save-debug-rollout-data wrote"
        )
    groups: list[list[Sample]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            groups.append([Sample.from_dict(data) for data in json.loads(line)])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--load-debug-rollout-data {path}:{number}: not a dumped group: {error}") from error
    return groups
