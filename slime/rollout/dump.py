"""Rollout dumps: the samples of one rollout in a file, to replay the training alone.

- Called by: --save-debug-rollout-data writes a dump, and --load-debug-rollout-data reads it.
- Invariant: JSON keeps every token, log-prob and reward exactly, so a replay trains on the same numbers bit for bit.

The first line records how the samples were sampled (`config.sampling_record`); each other line is a group. Dumps of
older versions begin with a group.
"""

from __future__ import annotations

import json
from pathlib import Path

from slime.config.args import Args
from slime.config.sampling_record import SamplingRecord, read_record
from slime.core.sample import Sample


def write_dump(path: Path, groups: list[list[Sample]], record: SamplingRecord | None = None) -> None:
    """Write the record, then one JSON line for each group. None: it is not known how the samples were sampled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if record is not None:
            file.write(record.line() + "\n")
        for group in groups:
            file.write(json.dumps([sample.to_dict() for sample in group]) + "\n")


def read_replay(args: Args, rollout_id: int) -> tuple[list[list[Sample]], SamplingRecord | None]:
    """Return the groups of the rollout's dump, and how they were sampled; None if the dump does not record it.

    Raises:
        ValueError: as in `read_dump`, or the samples do not fit the flags with which training would read them.
    """
    path = Path(args.resolved.load_debug_rollout_data.format(rollout_id=rollout_id))
    groups, record = read_dump(path), read_record(path)
    faults = [] if record is None or args.debug_rollout_only else record.faults(args)
    if faults:
        raise ValueError(f"--load-debug-rollout-data {path}: {'; '.join(faults)}")
    return groups, record


def read_dump(path: Path) -> list[list[Sample]]:
    """Return the groups in order.

    Raises:
        ValueError: the file is missing or a line of it is not a dumped group.
    """
    if not path.is_file():
        raise ValueError(
            f"--load-debug-rollout-data {path}: no such file; it has to be one that --save-debug-rollout-data wrote"
        )
    groups: list[list[Sample]] = []
    begin = 0 if read_record(path) is None else 1
    for number, line in enumerate(path.read_bytes().splitlines()[begin:], begin + 1):
        try:
            groups.append([Sample.from_dict(data) for data in json.loads(line)])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"--load-debug-rollout-data {path}:{number}: not a dumped group: {error}") from error
    return groups
