"""args.yaml: every resolved value, in the form that `--config` reads.

Path: the cluster writes it beside the checkpoints. Invariant: `--config args.yaml` gives the same Args again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import yaml

from slime.config.args import SECTIONS, Args
from slime.config.flags.table import Source, all_flags

ONE_CALL = {"config", "dry_run"}
"""About one call of the program, not about the run."""
SECRETS = ("api_key", "password")
"""Ends of names whose values are not written to disk."""


def _plain(value: Any) -> Any:
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


def dump_args(args: Args) -> str:
    """All values as YAML, by section."""
    parts: list[str] = []
    for section in SECTIONS:
        names = [item.name for item in fields(section) if item.name not in ONE_CALL]
        values = {name: _plain(vars(args)[name]) for name in names}
        parts.append(f"# {section.__name__}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
    passed: list[tuple[Source, Mapping[str, Any]]] = [
        ("megatron", args.megatron_extra),
        ("sglang", args.sglang),
        ("router", args.router),
    ]
    for source, mapping in passed:
        keys = {spec.name: spec.flag[2:].replace("-", "_") for spec in all_flags() if spec.source == source}
        if mapping:
            values = {keys[name]: _plain(value) for name, value in mapping.items() if not name.endswith(SECRETS)}
            parts.append(f"# passed on to {source}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
    return "\n".join(parts)
