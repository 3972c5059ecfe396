"""The text of args.yaml: every resolved value, in the form that `--config` reads.

- Used by: the cluster, which writes it next to the checkpoints, and trackers, which show it.
- Invariant: `--config args.yaml` gives the same Args again, except for secrets. A value that contains a secret is left
  out and named in a comment, so that no run starts with asterisks as a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import yaml

from slime.config.args import SECTIONS, Args
from slime.config.flags.simulate_options import SimulateOptions
from slime.config.flags.table import Source, all_flags
from slime.config.problem import show
from slime.config.secrets import masked

ONE_CALL = {"config", "dry_run", *(item.name for item in fields(SimulateOptions))}
"""The flags that describe one call of the program, not the run."""


def _plain(value: Any) -> Any:
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


def dump_args(args: Args) -> str:
    """Return all values as YAML, by section."""
    parts: list[str] = []
    for section in SECTIONS:
        names = [item.name for item in fields(section) if item.name not in ONE_CALL]
        if names:
            parts.append(_part(section.__name__, "slime", {name: vars(args)[name] for name in names}))
    passed: list[tuple[Source, Mapping[str, Any]]] = [
        ("megatron", args.megatron_extra),
        ("sglang", args.sglang),
        ("router", args.router),
    ]
    for source, mapping in passed:
        if mapping:
            parts.append(_part(f"passed on to {source}", source, mapping))
    return "\n".join(parts)


def _part(title: str, source: Source, mapping: Mapping[str, Any]) -> str:
    specs = {spec.name: spec for spec in all_flags() if spec.source == source}
    values: dict[str, Any] = {}
    comments = [f"# {title}"]
    for name, value in mapping.items():
        spec = specs[name]
        key = name if source == "slime" else spec.flag[2:].replace("-", "_")
        shown = masked(spec.secret, show(value)) if spec.secret else show(value)
        if shown == show(value):
            values[key] = _plain(value)
        else:
            comments.append(f"# {key} is not written here, because it holds a secret: {shown}")
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""
    return "\n".join([*comments, body])
