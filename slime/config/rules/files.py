"""Rules for files and user code: everything that a real run reads must exist and be readable before anything starts.

- Used by: `rules.check`.
- Invariant: in a --dry-run, a missing path is a warning, and of a data file only the first rows are checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from slime.config.data_files import SUFFIXES, split_slice
from slime.config.data_paths import data_paths, data_words
from slime.config.data_rows import DataError, DataKeys
from slime.config.eval_data import EvalDataset, eval_datasets
from slime.config.flags.rollout_options import HookOptions, RolloutOptions
from slime.config.problem import Problem
from slime.config.rules.case import Case
from slime.config.rules.data import RowCheck, check_rows
from slime.config.rules.imports import import_hook
from slime.config.rules.rewards import line_reward_fault
from slime.core.plugins import HOOKS, HookError, hook_path
from slime.core.small_files import is_directory, is_file

PLANNED_ROWS = 10_000
"""The number of rows of each file that a --dry-run checks, so that it stays quick with large files."""


def prompt_file(case: Case) -> Iterable[Problem]:
    """Check that --prompt-data is given and exists, and that every row can be used."""
    args = case.args
    if args.num_rollout == 0 or args.debug_train_only:
        return
    own_source = args.data_source_path == HookOptions().data_source_path
    if args.prompt_data is None:
        if own_source and args.load_debug_rollout_data is None:
            yield case.missing("prompt_data", "not given; prompts come from it", "name a jsonl or parquet file")
        return
    num_weights, num_words = len(args.prompt_data_weights), len(data_words(args.prompt_data))
    if num_weights not in (0, num_words):
        rule = f"has {num_weights} values, and --prompt-data has {num_words}"
        remedy = "give one weight for each word of --prompt-data; the files of a pattern share theirs"
        yield case.error("prompt_data_weights", rule, remedy, also=["prompt_data"])
    if own_source:
        keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
        asked = [args.metadata_key] if args.metadata_key != RolloutOptions.metadata_key else []
        asked += [args.tool_key] if args.tool_key is not None else []
        judged = case.generates and args.loss_type != "sft_loss"
        reward = _reward_check(case, keys, args.rm_type) if judged else None
        check = _RowChecks(keys, bool(args.apply_chat_template), reward, tuple(asked))
        yield from _data_files(case, "prompt_data", args.prompt_data, check)


def _reward_check(case: Case, keys: DataKeys, rm_type: str | None) -> RowCheck:
    """Return a check of whether the reward `rm_type` can judge a row."""

    def check(row: dict[str, Any]) -> tuple[str, str] | None:
        return line_reward_fault(case.args, keys.metadata(row), rm_type, keys.label(row))

    return check


@dataclass(frozen=True)
class _RowChecks:
    """The checks of every row of a data set. `needs`: keys given by a flag, which at least one row must have."""

    keys: DataKeys
    chat_template: bool
    reward: RowCheck | None
    needs: tuple[str, ...] = ()


def _data_files(case: Case, field: str, words: str | Sequence[str], checks: _RowChecks) -> Iterable[Problem]:
    try:
        paths = data_paths(words)
    except DataError as error:
        rule = error.rule if error.where == words else f"{error.where}: {error.rule}"
        yield case.missing(field, rule, error.remedy)
        return
    except ValueError as error:
        rule, _, remedy = str(error).removeprefix(f"{words}: ").rpartition("; ")
        yield case.error(field, rule, remedy)
        return
    files = [split_slice(path)[0] for path in paths]
    for file in files:
        suffix = Path(file).suffix
        if not is_file(file):
            yield case.missing(field, f"there is no file {file}", "name a jsonl or parquet file")
        elif suffix not in SUFFIXES:
            rule = f"{file}: {suffix or 'no suffix'} is not a known type of data file"
            yield case.error(field, rule, f"name one in {', '.join(SUFFIXES)}")
    if all(is_file(file) and Path(file).suffix in SUFFIXES for file in files):
        most = None if case.real else PLANNED_ROWS
        yield from check_rows(
            paths, checks.keys, chat_template=checks.chat_template, needs=checks.needs, check=checks.reward, most=most
        )


def eval_files(case: Case) -> Iterable[Problem]:
    """Check that the evaluation sets are well-formed and exist, and that every row can be used."""
    args = case.args
    field = "eval_prompt_data" if args.eval_config is None else "eval_config"
    if args.eval_config is not None and not is_file(args.eval_config):
        yield case.missing("eval_config", "there is no such file", "name a YAML file with a list `datasets`")
        return
    if not (args.eval_prompt_data or args.eval_config):
        return
    try:
        datasets: list[EvalDataset] = eval_datasets(args)
    except ValueError as error:
        rule, _, remedy = str(error).removeprefix(str(args.eval_config)).lstrip(": ").rpartition("; ")
        yield case.error(field, rule, remedy)
        return
    for dataset in datasets:
        reward = None if args.validates else _reward_check(case, dataset.keys, dataset.rm_type)
        check = _RowChecks(dataset.keys, dataset.apply_chat_template, reward)
        yield from _data_files(case, field, dataset.path, check)


def _has_checkpoint(directory: str) -> bool:
    """Return whether the directory contains checkpoints or is one. Loading checks whether they are complete."""
    try:
        names = os.listdir(directory)
    except OSError:  # there is none yet
        return False
    return any(name.startswith("iter_") or name in ("release", ".metadata", "config.json") for name in names)


def weights(case: Case) -> Iterable[Problem]:
    """Check that the actor has weights to start from, in --load or --ref-load.

    A KL term and a teacher require --ref-load in any case. Unset, it is --hf-checkpoint.
    """
    args = case.args
    if args.debug_rollout_only:
        return
    has_checkpoint = args.load is not None and _has_checkpoint(args.load)
    needs_reference = args.needs_reference
    if args.ref_load is None:
        if args.distills:
            yield case.error("ref_load", "not given; the teacher is loaded from it", "name a checkpoint")
        return  # without --hf-checkpoint, another rule's error
    if args.ref_load == args.hf_checkpoint:
        return  # another rule checks that directory
    if not is_directory(args.ref_load) and (needs_reference or not has_checkpoint):
        remedy = "convert one with tools/convert_hf_to_torch_dist.py, or name an HF directory"
        yield case.missing("ref_load", "there is no such directory", remedy)


def _many_saves(case: Case) -> bool:
    """Return whether the run writes more than one checkpoint."""
    args = case.args
    if not args.saves:
        return False
    if args.save_interval is None:
        return args.save_interval_minutes is not None
    return args.num_rollout is None or args.num_rollout > args.save_interval


def files_of_rollouts(case: Case) -> Iterable[Problem]:
    """Check that paths can be formatted with {rollout_id}, and contain it if one file would replace another."""
    args = case.args
    for field in ("save_debug_rollout_data", "load_debug_rollout_data", "save_hf"):
        path: str | None = vars(args)[field]
        if path is None:
            continue
        if not _fills_in(path):
            remedy = "correct what is in braces; {rollout_id:05d} has five digits, and {{ means {"
            yield case.error(field, "only {rollout_id} can be filled in", remedy)
            continue
        one_file = path.format(rollout_id=0) == path.format(rollout_id=1)
        about = ("num_rollout", "num_epoch", "save", "save_interval", "save_interval_minutes")
        if one_file and field == "save_debug_rollout_data" and args.num_rollout not in (0, 1):
            rule = "has no {rollout_id}: each rollout would replace the previous one's file"
            yield case.error(field, rule, "put {rollout_id} into it", also=about)
        if one_file and field == "save_hf" and _many_saves(case):
            rule = "has no {rollout_id}: each export replaces the previous one"
            yield case.warning(field, rule, "put {rollout_id} into it to keep them all", also=about)


def _fills_in(path: str) -> bool:
    """Return whether every field in braces is {rollout_id}, plain or with a number of digits."""
    try:
        parts = list(Formatter().parse(path))
    except ValueError:
        return False
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    return all(
        name == "rollout_id" and conversion is None and re.fullmatch("(0?[1-9][0-9]?)?d?", spec or "")
        for name, spec, conversion in fields
    )


def debug_data(case: Case) -> Iterable[Problem]:
    """Check that --load-debug-rollout-data names an existing directory."""
    path = case.args.load_debug_rollout_data
    if path is not None and case.args.num_rollout != 0:
        start = path.split("{", 1)[0]
        folder = Path(start) if start.endswith("/") else Path(start).parent
        if not is_directory(folder):
            yield case.missing("load_debug_rollout_data", f"there is no directory {folder}", "name the dump's files")


def train_data(case: Case) -> Iterable[Problem]:
    """Check that --save-debug-train-data names an empty or new directory that can be written."""
    path = case.args.save_debug_train_data
    if path is None or case.args.debug_rollout_only or is_file(path):
        return  # a file there is another rule's error
    folder = Path(path)
    try:
        used = is_directory(folder) and any(folder.iterdir())
    except OSError as error:
        yield case.missing("save_debug_train_data", f"cannot be read ({error.strerror})", "name another directory")
        return
    if used:
        rule = "already contains files, and a dump belongs to one run"
        yield case.error("save_debug_train_data", rule, "name a new directory, or empty this one")
        return
    there = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not is_directory(there) or not os.access(there, os.W_OK | os.X_OK):
        rule = f"{there} is {'not a directory' if not is_directory(there) else 'not writable'}"
        yield case.missing("save_debug_train_data", rule, "name a directory that can be written")


def hooks(case: Case) -> Iterable[Problem]:
    """Check that every given dotted path can be imported and has the signature of its hook."""
    defaults = HookOptions()
    rewards = case.args.reward_paths
    paths = {name: rewards if name == "custom_rm_path" else (hook_path(vars(case.args)[name]),) for name in HOOKS}
    for name, path in ((name, path) for name, each in paths.items() for path in each):
        if path is None or path == vars(defaults).get(name):
            continue
        try:
            import_hook(name, path)
        except HookError as error:
            complain = case.error if path.startswith("slime.") else case.missing
            yield complain(name, f"{path}: {error.rule}" if len(paths[name]) > 1 else error.rule, error.remedy)
