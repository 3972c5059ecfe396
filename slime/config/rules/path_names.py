"""The rule for the names of paths, whether or not the paths exist.

- Used by: `rules.check`, before the rules that look at files.
- Invariant: a file can have a path that passes.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem

READ = ("hf_checkpoint", "load", "ref_load", "critic_load", "prompt_data", "eval_prompt_data", "eval_config")
WRITTEN = ("save", "log_dir", "tensorboard_dir", "save_hf", "update_weight_disk_dir", "save_debug_rollout_data")
"""Fields of paths that are written; `paths.directories` checks the length of their names."""
MAX_NAME, MAX_PATH = 255, 4095
"""The largest number of bytes in one name and in a whole path on Linux."""


def path_names(case: Case) -> Iterable[Problem]:
    """Refuse paths that are empty or longer than file systems allow."""
    for field in (*READ, *WRITTEN, "save_debug_train_data", "load_debug_rollout_data"):
        value: str | tuple[str, ...] | None = vars(case.args)[field]
        if field not in case.given:
            continue
        for path in (value,) if isinstance(value, str) else value or ():
            longest = max((len(name.encode()) for name in path.split("/")), default=0)
            if not path.strip():
                yield case.error(field, "is empty", "name a path, or leave the flag out")
            elif field in WRITTEN:
                continue
            elif longest > MAX_NAME:
                rule = f"a name in it has {longest} bytes, and file systems allow at most {MAX_NAME}"
                yield case.error(field, rule, "shorten it")
            elif len(path.encode()) > MAX_PATH:
                rule = f"it has {len(path.encode())} bytes, and file systems allow at most {MAX_PATH}"
                yield case.error(field, rule, "shorten it")
