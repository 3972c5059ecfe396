"""The text of `--help`: every flag by section, including Megatron's and SGLang's."""

from __future__ import annotations

import textwrap
from itertools import groupby

from slime.config.flags.table import SET_BY_SLIME, FlagSpec, all_flags
from slime.config.problem import show

INTRODUCTION = """\
usage: python3 train.py [--config FILE.yaml] [flags]

A value follows its flag (--x v or --x=v). Switches are --x and --no-x. The last of a repeated flag counts.
--dry-run prints the resolved plan and stops. train_async.py takes the same flags."""


def _entry(spec: FlagSpec) -> str:
    metavar = "" if spec.kind == "bool" else " " + (spec.metavar or "|".join(spec.choices) or spec.kind.upper())
    if spec.num_values is not None and spec.metavar is None:
        metavar += " ..."
    names = f"{spec.flag}{metavar}"
    more = [*spec.on[1:], *spec.off]
    facts = [f"also {', '.join(more)}"] if more else []
    if spec.default not in (None, False, (), []):
        facts.append(f"default {spec.default if isinstance(spec.default, bool) else show(spec.default)}")
    text = " ".join([spec.help, f"({'; '.join(facts)})" if facts else ""]).strip()
    body = textwrap.fill(text, width=110, initial_indent="      ", subsequent_indent="      ")
    return f"  {names}\n{body}"


def format_help() -> str:
    """Return the text of `--help`. Neither Megatron nor SGLang has to be installed."""
    parts = [INTRODUCTION]
    shown = [spec for spec in all_flags() if (spec.source, spec.name) not in SET_BY_SLIME]
    for section, specs in groupby(shown, key=lambda spec: spec.section):
        parts += [f"\n{section}", *(_entry(spec) for spec in specs)]
    return "\n".join(parts)
