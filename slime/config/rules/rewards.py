"""Rules for rewards: every response has a reward function, and that function has all it needs.

- Used by: `rules.check`.
- Invariant: these rules check the flags, and `line_reward_fault` applies the same rules to the metadata.rm_type of a
  data row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from slime.config.args import Args
from slime.config.eval_data import readable_eval_datasets, sets_with_rm_type
from slime.config.problem import Problem
from slime.config.reward_types import (
    BOXED_PREFIX,
    GRAMMAR_REMEDY,
    compares_mathematics,
    facts_of,
    grammar_fault,
    needs_label,
    needs_url,
    reward_type_remedy,
)
from slime.config.rules.case import Case
from slime.config.rules.imports import import_hook
from slime.core.plugins import HookError

_OF_OTHERS = frozenset(["prompts", "completions", "completion_ids", "data_source", "solution_str", "ground_truth"])
"""Parameters of TRL's and verl's rewards, which are called with other arguments."""
_METADATA_REMEDY = "every row then needs metadata.rm_type; or add --rm-type or --custom-rm-path"


def reward_types(case: Case) -> Iterable[Problem]:
    """Check the names of reward types, and that evaluation has only one judge."""
    args = case.args
    for field in ("rm_type", "eval_rm_type"):
        value: str | None = vars(args)[field]
        if value is not None and facts_of(value) is None and (field == "rm_type" or value != args.rm_type):
            yield case.error(field, "unknown reward type", reward_type_remedy())
    if args.custom_rm_path is not None and "eval_rm_type" in case.given:
        rule = f"--custom-rm-path {' '.join(args.reward_paths)} also judges evaluation"
        yield case.error("eval_rm_type", rule, "leave one of the two out", also=["custom_rm_path"])


def reward(case: Case) -> Iterable[Problem]:
    """Check that training samples have a reward; the check of every row finds labels that are missing."""
    args = case.args
    if not case.generates or args.custom_rm_path is not None or args.loss_type == "sft_loss":
        return
    if args.rm_type is None:
        if args.custom_generate_function_path is not None:  # the function may set sample.reward
            return
        yield case.warning("rm_type", "not given, nor --custom-rm-path", _METADATA_REMEDY, also=["custom_rm_path"])


def eval_rewards(case: Case) -> Iterable[Problem]:
    """Check the reward of each evaluation set."""
    args = case.args
    if args.validates:  # the evaluation is a loss
        return
    datasets = readable_eval_datasets(case.args)
    field = "eval_prompt_data" if args.eval_config is None else "eval_config"
    if args.custom_rm_path is not None:
        if datasets and (names := sets_with_rm_type(args)):
            paths = " ".join(args.reward_paths)
            rule = f"its rm_type of {', '.join(names)} is not used: --custom-rm-path {paths} judges"
            yield case.error("eval_config", rule, "leave one of the two out", also=["custom_rm_path"])
        return
    for dataset in datasets:
        rm_type = dataset.rm_type
        if rm_type is None and args.custom_generate_function_path is None:
            yield case.warning(field, f"{dataset.name} has no reward of its own", _METADATA_REMEDY)
        elif rm_type is not None and facts_of(rm_type) is None and rm_type != args.eval_rm_type:
            yield case.error(field, f"{dataset.name}: rm_type {rm_type!r} is unknown", reward_type_remedy())
        if needs_label(rm_type) and dataset.label_key is None:
            rule = f"{dataset.name}: {rm_type} compares the answer with a label, but no label key is given"
            yield case.error("eval_label_key", rule, "add --eval-label-key or --label-key", also=["label_key"])


def reward_url(case: Case) -> Iterable[Problem]:
    """Check that --rm-url is given if a reward needs it, and that it is a URL."""
    args = case.args
    types = [args.rm_type, args.eval_rm_type, *(dataset.rm_type for dataset in readable_eval_datasets(case.args))]
    if args.rm_url is None:
        if args.custom_rm_path is None and (sent := next(filter(needs_url, types), None)):
            rule = f"not given; {sent.removeprefix(BOXED_PREFIX)} sends responses there to be judged"
            yield case.error("rm_url", rule, "add --rm-url", also=["rm_type", "eval_rm_type"])
    elif not _is_url(args.rm_url):
        yield case.error("rm_url", "is not a URL", "write it as http://HOST:PORT/PATH or https://...")


def grammar(case: Case) -> Iterable[Problem]:
    """Check that the ANTLR runtime is the one with which the comparison of mathematics was tested."""
    args = case.args
    if args.custom_rm_path is not None:
        return
    sets = [dataset.rm_type for dataset in readable_eval_datasets(case.args)]
    for field, names in (("rm_type", [args.rm_type]), ("eval_rm_type", [args.eval_rm_type, *sets])):
        if any(compares_mathematics(name) for name in names):
            fault = grammar_fault()
            if fault is not None:
                yield case.missing(field, fault, GRAMMAR_REMEDY)
            return


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
    judged_by = named or rm_type
    facts = facts_of(judged_by)
    if facts is not None and (facts.checks_without_label or (label is not None and facts.needs_label)):
        fault = facts.check_label(str(judged_by), label or "", metadata)
        if fault is not None:
            return fault
    if not named:
        if rm_type is not None or args.custom_generate_function_path is not None:  # the function may judge
            return None
        return "it has no reward type", "give it metadata.rm_type, or add --rm-type or --custom-rm-path"
    if facts is None:
        return f"metadata.rm_type {named!r} is unknown", reward_type_remedy()
    if needs_url(named) and args.rm_url is None:
        return f"metadata.rm_type is {named!r}, but there is no --rm-url", "add --rm-url"
    if facts.needs_label and label is None:
        return f"metadata.rm_type is {named!r}, which compares the answer with a label", "add --label-key"
    return None


def custom_reward(case: Case) -> Iterable[Problem]:
    """Warn if the parameter name of the reward function contradicts --group-rm.

    A function that calls its parameter `sample` expects one sample, and one that calls it `samples` expects a group.
    """
    for path in case.args.reward_paths:
        yield from _parameter_names(case, path, f"{path}: " if len(case.args.reward_paths) > 1 else "")


def _parameter_names(case: Case, path: str, where: str) -> Iterable[Problem]:
    """Check the parameter names of one reward function; `where` begins each message."""
    args = case.args
    try:
        names = list(inspect.signature(import_hook("custom_rm_path", path)).parameters)
    except HookError:  # `hooks` reports it
        return
    about = ("group_rm",)
    if foreign := sorted(_OF_OTHERS & set(names[:4])):
        rule = f"{where}takes {', '.join(foreign)}, as the rewards of TRL or verl do"
        remedy = "call it from a function (args, sample), or (args, samples) with --group-rm; docs/hooks.md shows one"
        yield case.error("custom_rm_path", rule, remedy, also=about)
        return
    if args.group_rm and names[1:2] == ["sample"]:
        rule = f"{where}takes `sample`, but --group-rm passes a list of samples"
        yield case.warning("custom_rm_path", rule, "call it `samples`, or leave out --group-rm", also=about)
    if not args.group_rm and names[1:2] == ["samples"]:
        rule = f"{where}takes `samples`, but receives one sample at a time"
        yield case.warning("custom_rm_path", rule, "add --group-rm, or call it `sample`", also=about)


def reward_sum(case: Case) -> Iterable[Problem]:
    """Check that several reward functions have different names, and one weight each."""
    args = case.args
    names, weights = args.reward_names, args.reward_weights
    if len(names) < 2:
        if names and weights:
            rule = "there is one reward function, so there is no sum"
            remedy = "leave it out, or name several functions in --custom-rm-path"
            yield case.error("reward_weights", rule, remedy, also=["custom_rm_path"])
        return
    if len(weights) not in (0, len(names)):
        rule = f"has {len(weights)} values, and --custom-rm-path has {len(names)} functions"
        yield case.error("reward_weights", rule, "give one weight for each function", also=["custom_rm_path"])
    elif weights and not any(weights):
        rule = "all weights are 0, so every reward is 0"
        yield case.error("reward_weights", rule, "give a function that counts another weight", also=["custom_rm_path"])
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        rule = f"{names.count(name)} functions are called {name}, the name under which a function's value is recorded"
        yield case.error("custom_rm_path", rule, "rename one of them")
    if args.reward_key in names:
        rule = f"a function is called {args.reward_key}, the name under which the sum is stored (--reward-key)"
        yield case.error("custom_rm_path", rule, "rename it, or give another --reward-key", also=["reward_key"])


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or a broken IPv6 address
        return False
