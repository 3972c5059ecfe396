"""The names that --rm-type, --eval-rm-type, --eval-config and a data line's metadata.rm_type may hold.

Path: rules and the check of data lines refuse what is not here; `rollout.rm_hub` has the rule behind each name.
Invariant: every name here, with or without the prefix, is judged there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slime.config.args import Args
from slime.config.labels import choice_fault, label_fault

REWARD_TYPES = ("deepscaler", "dapo", "math", "f1", "gpqa", "remote_rm", "random")
BOXED_PREFIX = "boxed_"
r"""Before a type: what it judges is what the last \boxed{...} of the response holds, and nothing else of it."""

REWARD_TYPE_REMEDY = f"one of {', '.join(REWARD_TYPES)}, with or without {BOXED_PREFIX}; or --custom-rm-path"


def base_type(rm_type: object) -> str | None:
    """The type behind the prefix; None where there is none of this name."""
    name = rm_type.removeprefix(BOXED_PREFIX) if isinstance(rm_type, str) else None
    return name if name in REWARD_TYPES else None


def needs_label(rm_type: object) -> bool:
    """Whether it compares the answer with the label."""
    return base_type(rm_type) not in (None, "random", "remote_rm")


def compares_mathematics(rm_type: object) -> bool:
    """Whether it compares an answer with the label as mathematics."""
    return base_type(rm_type) in ("deepscaler", "dapo", "math")


def line_reward_fault(
    args: Args, metadata: Mapping[str, Any], rm_type: str | None, label: str | None
) -> tuple[str, str] | None:
    """Rule and remedy where the reward of a data line cannot be computed; None where it can.

    Its metadata.rm_type goes before `rm_type`, the data set's own (which other rules check). `label`: as the reward
    sees it; None where there is no key of it.
    """
    if args.custom_rm_path is not None:
        return None
    named = metadata.get("rm_type")
    if label is not None and (fault := _label_fault(named or rm_type, label, metadata)) is not None:
        return fault
    if not named:
        if rm_type is not None or args.custom_generate_function_path is not None:  # which may judge
            return None
        return "nothing says how to judge it", "give it metadata.rm_type, or add --rm-type or --custom-rm-path"
    base = base_type(named)
    if base is None:
        return f"metadata.rm_type is {named!r}, which is none", REWARD_TYPE_REMEDY
    if base == "remote_rm" and args.rm_url is None:
        return f"metadata.rm_type is {named!r}, and there is no --rm-url", "add --rm-url"
    if needs_label(named) and label is None:
        return f"metadata.rm_type is {named!r}, which compares the answer with a label", "add --label-key"
    return None


def _label_fault(rm_type: object, label: str, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Rule and remedy where no answer can be right by this label; None where one can."""
    base = base_type(rm_type)
    if base == "gpqa":
        fault = choice_fault(label, metadata)
        remedy = "give it a letter, the text of one of metadata.choices, or metadata.correct_letter"
        return None if fault is None else (f"{rm_type} finds no right choice: {fault}", remedy)
    if base == "f1" or not needs_label(rm_type):  # by f1, an empty answer is right where the label is empty
        return None
    if not label.strip():
        return f"its label is empty, and {rm_type} compares the answer with it: no answer is right", "correct the line"
    if compares_mathematics(rm_type) and (fault := label_fault(label)) is not None:
        return f"no answer can equal its label {_short(label)} as {rm_type} compares them: {fault}", "correct the line"
    return None


def _short(label: str) -> str:
    """Its end: an answer comes last."""
    return repr(label if len(label) <= 60 else f"...{label[-57:]}")


def may_ask_remote(args: Args) -> bool:
    """Whether a flag asks for remote_rm, or leaves open what does (a set in --eval-config, data lines)."""
    types = (args.rm_type, args.eval_rm_type)
    return None in types or args.eval_config is not None or any(base_type(name) == "remote_rm" for name in types)
