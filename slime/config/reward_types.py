"""The names of reward types in --rm-type, --eval-rm-type, --eval-config and a data row's metadata.rm_type.

- Used by: the rules and the check of data rows, which refuse other names; `rollout.rewards` implements each reward.
  Rules and every reward worker call `grammar_fault`, because a worker's node may have another version.
- Invariant: every name here, with or without the prefix, has an implementation there. Every verdict of
  mathematics comes from the version of the ANTLR runtime that the verdicts were tested with, or there is no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from slime.config.args import Args
from slime.config.labels import choice_fault, label_fault

REWARD_TYPES = ("deepscaler", "dapo", "math", "f1", "gpqa", "remote_rm", "random")
BOXED_PREFIX = "boxed_"
r"""The prefix of a type that judges only the content of the response's last \boxed{...}."""

REWARD_TYPE_REMEDY = f"one of {', '.join(REWARD_TYPES)}, with or without {BOXED_PREFIX}; or --custom-rm-path"


def base_type(rm_type: object) -> str | None:
    """Return the type without the prefix, or None if it is unknown."""
    name = rm_type.removeprefix(BOXED_PREFIX) if isinstance(rm_type, str) else None
    return name if name in REWARD_TYPES else None


def needs_label(rm_type: object) -> bool:
    """Return whether a reward type compares the answer with the label."""
    return base_type(rm_type) not in (None, "random", "remote_rm")


def compares_mathematics(rm_type: object) -> bool:
    """Return whether a reward type compares the answer with the label as mathematics."""
    return base_type(rm_type) in ("deepscaler", "dapo", "math")


def line_reward_fault(
    args: Args, metadata: Mapping[str, Any], rm_type: str | None, label: str | None
) -> tuple[str, str] | None:
    """Return rule and remedy if the reward of a data row cannot be computed, and None if it can.

    The row's metadata.rm_type overrides `rm_type`, the data set's type, which other rules check. `label`: the label
    that the reward receives; None if no label key is given.
    """
    if args.custom_rm_path is not None:
        return None
    named = metadata.get("rm_type")
    if label is not None and (fault := _label_fault(named or rm_type, label, metadata)) is not None:
        return fault
    if not named:
        if rm_type is not None or args.custom_generate_function_path is not None:  # the function may judge
            return None
        return "it has no reward type", "give it metadata.rm_type, or add --rm-type or --custom-rm-path"
    base = base_type(named)
    if base is None:
        return f"metadata.rm_type {named!r} is unknown", REWARD_TYPE_REMEDY
    if base == "remote_rm" and args.rm_url is None:
        return f"metadata.rm_type is {named!r}, but there is no --rm-url", "add --rm-url"
    if needs_label(named) and label is None:
        return f"metadata.rm_type is {named!r}, which compares the answer with a label", "add --label-key"
    return None


def _label_fault(rm_type: object, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return rule and remedy if no answer can be right by this label, and None if one can."""
    base = base_type(rm_type)
    if base == "gpqa":
        fault = choice_fault(label, metadata)
        remedy = "give it a letter, the text of one of metadata.choices, or metadata.correct_letter"
        return None if fault is None else (f"{rm_type} finds no right choice: {fault}", remedy)
    if base == "f1" or not needs_label(rm_type):  # with f1, an empty answer is right for an empty label
        return None
    if not label.strip():
        return f"its label is empty, and {rm_type} compares the answer with it: no answer is right", "correct the line"
    if compares_mathematics(rm_type) and (fault := label_fault(label)) is not None:
        return f"no answer can equal its label {_short(label)} as {rm_type} compares them: {fault}", "correct the line"
    return None


def _short(label: str) -> str:
    """Return the end of a label, because the answer comes last."""
    return repr(label if len(label) <= 60 else f"...{label[-57:]}")


def may_ask_remote(args: Args) -> bool:
    """Return whether some reward may be remote_rm, by a flag, a set in --eval-config or a data row."""
    types = (args.rm_type, args.eval_rm_type)
    return None in types or args.eval_config is not None or any(base_type(name) == "remote_rm" for name in types)


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
