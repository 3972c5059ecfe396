"""run.json: how a run was started, so that it can be started again: command, versions, commit, host and plan.

- Used by: the cluster, when the run is accepted. Every start of a run adds one entry, also after a fault.
- Invariant: nothing here can end a run; what cannot be found out is null. Secrets are masked by the caller's masker.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import slime
from slime.core.masking import Masker

RUN_RECORD = "run.json"
PACKAGES = ("torch", "megatron-core", "ray", "sglang", "sglang-router", "transformers", "numpy")
GIT_TIMEOUT_S = 5.0
"""Seconds for one call of git; a checkout on a slow file system may take longer, and then is left out."""


def describe_start(command: Sequence[str], plan: str, masker: Masker, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of one start; `facts` are its first keys."""
    root = Path(slime.__file__).parents[1]
    return {
        **facts,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [masker(word) for word in command],
        "folder": os.getcwd(),
        "host": {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "versions": versions(),
        "git": {"slime": checkout(root), "folder": checkout(Path.cwd())},
        "plan": masker(plan).splitlines(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of slime, Python and the packages that decide what a run computes; None: not installed."""
    found: dict[str, str | None] = {"slime": slime.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def checkout(folder: Path) -> dict[str, Any] | None:
    """Return commit and state of the git checkout that `folder` is in; None if it is in none, or git does not answer.

    A file that git ignores or does not track does not make it dirty.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]  # a checkout may name a program there
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> list[str]:
    """Return this process's command; `hide_command_line` has already masked the flags that are secret."""
    return [sys.executable, *sys.argv]


def add_start(directory: Path, entry: Mapping[str, Any]) -> list[str]:
    """Add the entry to the directory's run.json; return a warning if that is not possible.

    A file that cannot be read is kept as run-damaged.json.
    """
    path = directory / RUN_RECORD
    warnings: list[str] = []
    try:
        starts = _starts_in(path) if path.exists() else []
        if starts is None:
            aside = path.with_name("run-damaged.json")
            path.rename(aside)
            starts = []
            warnings.append(f"{path}: not the starts of a run, and moved to {aside.name}")
        written = path.with_name(f".tmp_{path.name}")
        written.write_text(
            json.dumps({"starts": [*starts, entry]}, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
            errors="backslashreplace",
        )
        written.rename(path)
    except (OSError, ValueError, TypeError) as error:
        return [f"{path}: cannot be written ({error}); the run goes on without it"]
    return warnings


def _starts_in(path: Path) -> list[Any] | None:
    """Return the entries of a run.json; None if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    starts = cast(dict[str, Any], content).get("starts") if isinstance(content, dict) else None
    return cast(list[Any], starts) if isinstance(starts, list) else None
