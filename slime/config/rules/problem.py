"""Problem: one thing wrong with what the user said, and UsageError: all of them at once.

Path: `parse`, `architecture` and `rules` make Problems; `parse.load_args` raises the errors together and hands the
warnings back. Invariant: a Problem names the flag, its value, the rule, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from slime.core.printable import PLACE, one_line, printable

Severity = Literal["error", "warning"]

MAX_SHOWN = 50
"""Problems that one message lists."""


def flag_name(field: str) -> str:
    """`rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + field.replace("_", "-")


def show(value: Any) -> str:
    """A value as it would be typed; switches and "not given" show nothing."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, tuple | list):
        return " ".join(str(item) for item in cast(Sequence[Any], value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`where` is a flag, or a file and line."""

    severity: Severity
    where: str
    value: str = ""
    rule: str
    remedy: str
    fields: frozenset[str] = frozenset()
    """Fields of Args that it is about: one that could not be read itself is not complained about a second time."""

    def __str__(self) -> str:
        about = f"{printable(self.where, PLACE)} {printable(self.value)}".rstrip()
        return f"{about}: {one_line(self.rule)}; {one_line(self.remedy)}"

    def masked(self, mask: Callable[[str], str]) -> Problem:
        """This problem with every text passed through `mask`."""
        texts = {name: mask(vars(self)[name]) for name in ("where", "value", "rule", "remedy")}
        return replace(self, **texts)


class UsageError(ValueError):
    """Everything that is wrong with the command line, in one exception."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))  # a flag that is repeated is wrong once
        super().__init__(self.problems)

    def __str__(self) -> str:
        number = len(self.problems)
        lines = [f"{number} problem{'s' if number != 1 else ''} with the arguments:"]
        lines += [f"  {problem}" for problem in self.problems[:MAX_SHOWN]]
        if number > MAX_SHOWN:
            lines.append(f"  and {number - MAX_SHOWN} more")
        return "\n".join(lines)
