"""`Problem`, one fault in the arguments, and `UsageError`, which reports all of them at once.

- Used by: `parse`, `architecture` and `rules`, which make Problems; `parse.load_args` raises all errors together and
  returns the warnings.
- Invariant: a Problem names the flag, its value, the rule and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from slime.core.printable import PLACE, one_line, printable

Severity = Literal["error", "warning"]

MAX_SHOWN = 50
"""The largest number of problems that one message lists."""


def flag_name(field: str) -> str:
    """Return the flag of a field: `rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + field.replace("_", "-")


def show(value: Any) -> str:
    """Return a value as a user would type it; an empty text for switches and for "not given"."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, tuple | list):
        return " ".join(str(item) for item in cast(Sequence[Any], value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One error or warning. `where` is a flag, or a file and line."""

    severity: Severity
    where: str
    value: str = ""
    rule: str
    remedy: str
    fields: frozenset[str] = frozenset()
    """The fields of Args that the rule read. If one of them could not be parsed, this problem is not reported too."""

    def __str__(self) -> str:
        about = f"{printable(self.where, PLACE)} {printable(self.value)}".rstrip()
        return f"{about}: {one_line(self.rule)}; {one_line(self.remedy)}"

    def masked(self, mask: Callable[[str], str]) -> Problem:
        """Return this problem with every text passed through `mask`."""
        texts = {name: mask(vars(self)[name]) for name in ("where", "value", "rule", "remedy")}
        return replace(self, **texts)


class UsageError(ValueError):
    """All errors in the command line, in one exception."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))  # a repeated flag is reported once
        super().__init__(self.problems)

    def __str__(self) -> str:
        number = len(self.problems)
        lines = [f"{number} problem{'s' if number != 1 else ''} with the arguments:"]
        lines += [f"  {problem}" for problem in self.problems[:MAX_SHOWN]]
        if number > MAX_SHOWN:
            lines.append(f"  and {number - MAX_SHOWN} more")
        return "\n".join(lines)
