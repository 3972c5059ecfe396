"""The built-in rewards: one row for each name in --rm-type, --eval-rm-type, --eval-config and metadata.rm_type.

- Used by: the rules and the check of data rows, which refuse other names; `rollout.rewards.reward` finds the function
  of a name in its row. Rules and every reward worker call `grammar_fault`, because a worker's node may have another
  version.
- Invariant: no other place lists the names or compares them. Every verdict of mathematics comes from the version of the
  ANTLR runtime that the verdicts were tested with, or there is no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from slime.config.labels import choice_fault, label_fault
from slime.core.code_tests import code_tests

LabelCheck = Callable[[str, str, Mapping[str, Any]], tuple[str, str] | None]
"""Takes a type, a label and a row's metadata; returns rule and remedy if no answer can be right, else None."""


def not_empty(rm_type: str, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Refuse an empty label."""
    if label.strip():
        return None
    return f"its label is empty, and {rm_type} compares the answer with it: no answer is right", "correct the line"


def _anything(rm_type: str, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Accept every label: with f1, an empty answer is right for an empty label."""


def _mathematics(rm_type: str, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    if not label.strip():
        return not_empty(rm_type, label, metadata)
    fault = label_fault(label)
    if fault is None:
        return None
    shown = repr(label if len(label) <= 60 else f"...{label[-57:]}")  # the answer comes last
    return f"no answer can equal its label {shown} as {rm_type} compares them: {fault}", "correct the line"


def _choice(rm_type: str, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    fault = choice_fault(label, metadata)
    if fault is None:
        return None
    remedy = "give it a letter, the text of one of metadata.choices, or metadata.correct_letter"
    return f"{rm_type} finds no right choice: {fault}", remedy


def _tests(rm_type: str, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    try:
        code_tests(label, metadata)
    except ValueError as error:
        return f"{rm_type} cannot judge by its tests: {error}", "correct the line"
    return None


@dataclass(frozen=True, kw_only=True)
class RewardFacts:
    """The facts about one built-in reward; the defaults are the common case."""

    module: str | None
    """The dotted path of the module whose `REWARD` scores responses; None: a judge at --rm-url scores them."""
    needs_label: bool = True
    """Whether it compares the answer with a label."""
    check_label: LabelCheck = not_empty
    """Checks the label of each data row before anything starts, if the reward needs one."""
    checks_without_label: bool = False
    """Whether `check_label` is called for a row without a label as well (with an empty one)."""
    runs_code: bool = False
    """Whether it runs the response's code, for which this machine needs a sandbox."""
    compares_mathematics: bool = False
    """Whether it compares answer and label as mathematics, for which the ANTLR runtime has to be the tested one."""


REWARD_TYPES: Mapping[str, RewardFacts] = {
    "deepscaler": RewardFacts(
        module="slime.rollout.rewards.deepscaler", check_label=_mathematics, compares_mathematics=True
    ),
    "dapo": RewardFacts(module="slime.rollout.rewards.dapo", check_label=_mathematics, compares_mathematics=True),
    "math": RewardFacts(
        module="slime.rollout.rewards.mathematics", check_label=_mathematics, compares_mathematics=True
    ),
    "f1": RewardFacts(module="slime.rollout.rewards.f1", check_label=_anything),
    "gpqa": RewardFacts(module="slime.rollout.rewards.gpqa", check_label=_choice),
    "code": RewardFacts(
        module="slime.rollout.rewards.code",
        needs_label=False,
        check_label=_tests,
        checks_without_label=True,
        runs_code=True,
    ),
    "remote_rm": RewardFacts(module=None, needs_label=False),
    "random": RewardFacts(module="slime.rollout.rewards.chance", needs_label=False),
}
"""One row for each type, in the order of the help."""

BOXED_PREFIX = "boxed_"
r"""The prefix of a type that judges only the content of the response's last \boxed{...}."""


def facts_of(rm_type: object) -> RewardFacts | None:
    """Return the row of a type, with or without the prefix; None if the type is unknown."""
    return REWARD_TYPES.get(rm_type.removeprefix(BOXED_PREFIX)) if isinstance(rm_type, str) else None


def reward_type_remedy() -> str:
    """Return the remedy for an unknown type."""
    return f"one of {', '.join(REWARD_TYPES)}, with or without {BOXED_PREFIX}; or --custom-rm-path"


def needs_label(rm_type: object) -> bool:
    """Return whether a reward type compares the answer with the label."""
    facts = facts_of(rm_type)
    return facts is not None and facts.needs_label


def needs_url(rm_type: object) -> bool:
    """Return whether a judge at --rm-url scores the responses of a reward type."""
    facts = facts_of(rm_type)
    return facts is not None and facts.module is None


def may_have_label(rm_type: object) -> bool:
    """Return whether a reward type reads the label, if there is one."""
    facts = facts_of(rm_type)
    return facts is not None and (facts.needs_label or facts.checks_without_label)


def runs_code(rm_type: object) -> bool:
    """Return whether a reward type runs the response's code."""
    facts = facts_of(rm_type)
    return facts is not None and facts.runs_code


def compares_mathematics(rm_type: object) -> bool:
    """Return whether a reward type compares the answer with the label as mathematics."""
    facts = facts_of(rm_type)
    return facts is not None and facts.compares_mathematics


_RUNTIME = "antlr4-python3-runtime"
_TESTED = "4.13.2"
"""The tested version. The LaTeX grammar of latex2sympy2_extended has one generated parser for each of 4.9.3, 4.11.0 and
4.13.2. With another runtime it parses nothing, and every answer would count as wrong."""
GRAMMAR_REMEDY = f"pip install {_RUNTIME}=={_TESTED}"


def grammar_fault() -> str | None:
    """Return the fault of the installed ANTLR runtime, or None if it is the tested version."""
    try:
        installed = version(_RUNTIME)
    except PackageNotFoundError:
        return f"{_RUNTIME} is not installed, but answers are compared as mathematics with version {_TESTED}"
    if installed == _TESTED:
        return None
    return f"{_RUNTIME} {installed} is installed, but the comparison of answers was tested with {_TESTED}"
