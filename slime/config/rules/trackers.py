"""The rule for trackers: their packages are installed, and W&B has an account or is offline.

- Used by: `rules.check`.
- Invariant: nothing is sent or started here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def trackers(case: Case) -> Iterable[Problem]:
    """Check that the packages of --use-tensorboard and --use-wandb are installed, and W&B's API key."""
    args = case.args
    if args.use_tensorboard and not is_installed("tensorboard"):
        yield case.missing("use_tensorboard", "tensorboard is not installed", "pip install 'slime[tensorboard]'")
    if args.use_wandb and not is_installed("wandb"):
        yield case.missing("use_wandb", "wandb is not installed", "pip install 'slime[wandb]'")
    elif args.use_wandb and case.real and not _has_account():
        remedy = "set WANDB_API_KEY, or WANDB_MODE=offline"
        yield case.error("use_wandb", "W&B has no API key, and would ask for it", remedy)


def is_installed(name: str) -> bool:
    """Return whether a package is installed. A plain directory of that name (W&B makes ./wandb) does not count."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _has_account() -> bool:
    """Return whether W&B finds an account in its environment variables, settings files or netrc."""
    wandb: Any = importlib.import_module("wandb")
    return wandb.setup().settings.mode != "online" or wandb.api.api_key is not None
