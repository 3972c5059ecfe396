"""The texts of `--help`: an overview of slime's own flags, and each section in full, also Megatron's and SGLang's.

- Used by: `parse`, when --help is given; the commands print their own texts by `show_help`.
- Invariant: neither Megatron nor SGLang has to be installed.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby

from slime.config.flags.table import SET_BY_SLIME, FlagSpec, all_flags
from slime.config.problem import show
from slime.core.printable import printable

USAGE = """\
usage: slime train [run.yaml] [flags]          also: python3 train.py [run.yaml] [flags]

A value follows its flag (--x v or --x=v). Switches are --x and --no-x. The last of a repeated flag counts, and a flag
wins over run.yaml, which has the same names: `rollout-batch-size: 32`. --dry-run prints the plan and stops."""
ALL = "all"
WIDTH = 110


def _key(title: str) -> str:
    """Return the name by which --help asks for a section: "MegatronRun: Megatron's flags ..." -> "megatron-run"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "-", title.partition(":")[0]).lower()


@cache
def sections() -> Mapping[str, tuple[FlagSpec, ...]]:
    """Return the flags of each section that a user may give, by the section's name; slime's sections come first."""
    shown = [spec for spec in all_flags() if (spec.source, spec.name) not in SET_BY_SLIME]
    return {_key(title): tuple(specs) for title, specs in groupby(shown, key=lambda spec: spec.section)}


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
    body = textwrap.fill(text, width=WIDTH, initial_indent="      ", subsequent_indent="      ")
    return f"  {names}\n{body}"


def _in_full(name: str) -> str:
    specs = sections()[name]
    return "\n".join([f"\n{specs[0].section}", *map(_entry, specs)])


def _overview() -> str:
    """Return the names of slime's own flags by section, on about two screens."""
    passed_on: list[str] = []
    parts = [USAGE, "\n--help SECTION describes the flags of a section, --help all those of every section."]
    for name, specs in sections().items():
        title = specs[0].section.partition(": ")[2]
        if specs[0].source == "slime":
            flags = textwrap.fill(
                " ".join(spec.flag for spec in specs),
                width=WIDTH,
                initial_indent="  ",
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
            parts.append(f"\n{name}: {title}\n{flags}")
        else:
            passed_on.append(f"{name}: {len(specs)} flags, {title}")
    return "\n".join([*parts, "", *passed_on])


def format_help(names: Sequence[str] = ()) -> str:
    """Return the overview, or the named sections in full; "all" is every section.

    Raises:
        ValueError: there is no such section; the message lists them.
    """
    if not names:
        return _overview()
    for name in names:
        if name not in (ALL, *sections()):
            raise ValueError(f"no section {printable(name)!r}; the sections are {', '.join(sections())}, and {ALL}")
    chosen = list(sections()) if ALL in names else list(dict.fromkeys(names))
    return "\n".join([USAGE, *map(_in_full, chosen)])


def show_help(text: str) -> None:
    """Print a help text; a pager that closes early (`--help | head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
