"""The checkpoint from which a run continues, and the flags with which it was written.

- Used by: the rules, which refuse what cannot be continued, and the plan, which lists the flags that have changed.
- Invariant: only names and one small JSON file are read, so that a --dry-run is quick; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import yaml

from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.data_files import read_rows, split_slice
from slime.config.data_paths import data_paths
from slime.config.data_rows import DataKeys, Row
from slime.config.end_tokens import read_json_object
from slime.config.problem import flag_name, show
from slime.core.checkpoint_names import RUN_FILE, checkpoints_in, rollout_of

OF_A_PLACE = frozenset(
    {
        *("load", "save", "log_dir", "run_name", "tensorboard_dir", "update_weight_disk_dir", "wandb_exp_name"),
        *("cpu_threads_per_process", "ckpt_step", "finetune", "no_load_optim", "no_load_rng"),
    }
)
"""Flags that belong to one start of the run. Their changes are not listed."""
FLAGS, DATA = "flags", "data"
SHA256, SHA256_OF_OTHERS = "sha256 of the data", "sha256 of the other columns"


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that the run continues from, with what its RUN_FILE holds; both are empty if it has none."""

    path: Path
    rollout_id: int
    flags: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


def record_of_run(args: Args, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint's RUN_FILE holds; `data`: the data source's own record of its data."""
    return {FLAGS: yaml.safe_load(dump_args(args)), DATA: dict(data)}


def resumed_checkpoint(args: Args) -> Resumed | None:
    """Return the newest checkpoint under --load, or that of --ckpt-step; None if the run starts at rollout 0."""
    if args.load is None or args.finetune:
        return None
    load = Path(args.load)
    itself = rollout_of(load.resolve().name)
    there = checkpoints_in(load) if itself is None else {itself: load}
    chosen = args.ckpt_step if args.ckpt_step in there else next(reversed(there), None)
    if chosen is None:
        return None
    try:
        record = read_json_object(there[chosen] / RUN_FILE)
    except (OSError, ValueError):  # loading refuses a damaged file, and takes the checkpoint before
        record = {}
    parts = [cast(dict[str, Any], record[key]) if isinstance(record.get(key), dict) else {} for key in (FLAGS, DATA)]
    return Resumed(there[chosen], chosen, *parts)


def first_rollout(args: Args) -> int:
    """Return the rollout with which the run starts, judged by the names of checkpoints."""
    resumed = resumed_checkpoint(args)
    return 0 if resumed is None else resumed.rollout_id + 1


def changed_flags(args: Args, resumed: Resumed) -> list[str]:
    """Return the flags whose values differ from those in the checkpoint: `--lr 1e-06 -> 5e-07`."""
    now: dict[str, Any] = yaml.safe_load(dump_args(args))
    without_effect = () if args.uses_critic else ("critic_lr",)
    both = [name for name in now if name in resumed.flags and name not in (*OF_A_PLACE, *without_effect)]
    return [
        f"{flag_name(name)} {_shown(resumed.flags[name])} -> {_shown(now[name])}"
        for name in both
        if resumed.flags[name] != now[name]
    ]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value is None or value == [] else show(value)


class RowHashes:
    """Two hashes over all rows of a data set in order: of the values under the keys, and of the other columns."""

    def __init__(self, keys: DataKeys) -> None:
        self._keys = keys
        self._used, self._others = hashlib.sha256(), hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the next row."""
        names = self._keys.names
        self._used.update(orjson.dumps(self._keys.values(row), option=orjson.OPT_SORT_KEYS))
        others = {name: value for name, value in row.items() if name not in names and value is not None}
        self._others.update(orjson.dumps(others, option=orjson.OPT_SORT_KEYS))

    @property
    def used(self) -> str:
        return self._used.hexdigest()

    @property
    def others(self) -> str:
        return self._others.hexdigest()


def hashes_of(args: Args, *, most_bytes: int | None = None) -> dict[str, str] | None:
    """Return the hashes of --prompt-data as checkpoints hold them.

    None if a file cannot be read, which another rule reports, or if the files have more than `most_bytes`.
    """
    if args.prompt_data is None:
        return None
    keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
    hashes = RowHashes(keys)
    try:
        paths = data_paths(args.prompt_data)
        if most_bytes is not None and sum(os.path.getsize(split_slice(path)[0]) for path in paths) > most_bytes:
            return None
        for path in paths:
            for row in read_rows(path, keys):
                if not isinstance(row, Row):
                    return None
                hashes.add(row.data)
    except (OSError, ValueError):
        return None
    return {SHA256: hashes.used, SHA256_OF_OTHERS: hashes.others}
