"""ServerCommand: how to run a server's module, with secrets that no other user of the machine can read.

- Used by: every kind of engine (`kinds`) and the router (`launch`) describe their process by one of these.
- Invariant: a secret is never on a command line; `keyed` hands it to the module instead.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from slime.config.flags.table import Source, secret_names
from slime.engine.keyed import VARIABLE


@dataclass(frozen=True)
class ServerCommand:
    """A module to run with `python -m`, the words after it, and changes to the environment."""

    module: str
    words: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    """More words that hold secrets."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])

    def argv(self) -> list[str]:
        """Return the whole command line."""
        runner = ["slime.engine.keyed"] if self.hidden else []
        return [sys.executable, "-m", *runner, self.module, *self.words]

    def full_environment(self) -> dict[str, str]:
        """Return the changes to the environment with the hidden words in it, where only their user can read them."""
        hidden = {VARIABLE: json.dumps(self.hidden)} if self.hidden else {}
        return {"PYTHONPATH": _import_path(), **hidden, **self.environment}


def take_hidden(settings: dict[str, Any], source: Source) -> tuple[str, ...]:
    """Remove the secret flags of `source` from `settings`, and return them as words of a command line."""
    taken = {name: settings.pop(name) for name in secret_names(source) & settings.keys()}
    return flag_words({name: value for name, value in taken.items() if value}, attach=True)


def flag_words(settings: Mapping[str, Any], *, attach: bool = False) -> tuple[str, ...]:
    """Convert {"a_b": 1, "c": True, "d": [1, 2]} to --a-b 1 --c --d 1 2; None and False are left out.

    `attach` writes --a-b=1, which also allows a value that starts with a dash.
    """
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        spelling = f"--{name.replace('_', '-')}"
        if isinstance(value, list | tuple):
            words += [spelling, *map(str, cast(Sequence[Any], value))]
        elif value is True:
            words.append(spelling)
        else:
            words += [f"{spelling}={value}"] if attach else [spelling, str(value)]
    return tuple(words)


def _import_path() -> str:
    """Return a PYTHONPATH with which a child process finds this package, wherever it was started from."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH")
    return own if not rest else f"{own}{os.pathsep}{rest}"
