"""Rules for the directory that a run writes to, and for the checkpoint that it continues from.

- Used by: `rules.check`.
- Invariant: a run that passes overwrites no other run's checkpoints, and its data are those of its checkpoint.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from slime.config.problem import Problem, show
from slime.config.ray_job import in_a_package
from slime.config.resolve import OUTPUTS
from slime.config.resuming import first_rollout, hashes_of, resumed_checkpoint
from slime.config.rules.case import Case
from slime.config.rules.paths import unwritable
from slime.core.checkpoint_names import checkpoints_in, iteration_name

_NAME = re.compile(r"\w[\w.+=@-]{0,99}")
PLANNED_BYTES = 64 * 2**20
"""The largest size of the data that a --dry-run compares with a checkpoint's, so that it stays quick."""


def own_directory(case: Case) -> Iterable[Problem]:
    """Check that a run without --save can make a directory of its own."""
    if not case.args.needs_directory:
        return
    folder = Path(OUTPUTS)
    if in_a_package():
        rule = f"not given, and a job's own folder is Ray's temporary copy, in which {folder}/ would be lost"
        yield case.missing("save", rule, "name a directory by its whole path")
        return
    fault = f"{folder.absolute()} is a file" if folder.is_file() else unwritable(folder)
    if fault is not None:
        rule = f"not given, and no directory can be made under {folder}/: {fault}"
        yield case.missing("save", rule, "name a directory that you can write to")


def run_name(case: Case) -> Iterable[Problem]:
    """Check that --run-name can be the name of a directory."""
    name = case.args.run_name
    if name is not None and _NAME.fullmatch(name) is None:
        rule = "is not a name: up to 100 letters, digits and ._+=@-, beginning with a letter or digit"
        yield case.error("run_name", rule, "choose another; --save takes a path")


def other_runs_checkpoints(case: Case) -> Iterable[Problem]:
    """Refuse a --save with checkpoints of later rollouts, because a resume would take them for this run's."""
    args = case.args
    if args.save is None or not args.saves:
        return
    first, there = first_rollout(args), checkpoints_in(args.save)
    later = [rollout_id for rollout_id in there if rollout_id >= first]
    if not later:
        return
    about = ("load", "ckpt_step", "finetune")
    found = f"it has checkpoints of an earlier run, up to {iteration_name(later[-1])}"
    if args.load is None:
        remedy = f"add --load {shlex.quote(args.save)} to continue that run, or name another directory"
        yield case.error("save", f"{found}, and without --load this run would start at rollout 0", remedy, also=about)
        return
    rule = f"{found}, and this run would start at rollout {first}: a resume would mix the two"
    yield case.error("save", rule, "name another directory", also=about)


def resumed_data(case: Case) -> Iterable[Problem]:
    """Refuse data, or an order of them, other than the checkpoint's: its place in the data would mean nothing."""
    args = case.args
    resumed = resumed_checkpoint(args)
    if resumed is None or not resumed.data or args.num_rollout == 0 or args.debug_rollout_only:
        return
    remedy = "restore it, or start a new run from these weights: --finetune, and another --save"
    for field in ("n_samples_per_prompt", "rollout_shuffle", "rollout_seed"):
        name = "--" + field.replace("_", "-")
        then, now = resumed.data.get(name), vars(args)[field]
        if then is not None and then != now:
            rule = f"is {now}, but {resumed.path} was written with {then}, and its place in the data depends on it"
            yield case.error(field, rule, remedy, also=["load"])
    if args.has_own_data_source:
        return
    weights = show(resumed.flags.get("prompt_data_weights") or "unset")
    if weights != show(list(args.prompt_data_weights) or "unset"):
        rule = f"{resumed.path} was written with other weights ({weights}), and its place in the data depends on them"
        yield case.error("prompt_data_weights", rule, remedy.replace("it,", "them,"), also=["load"])
    now = hashes_of(args, most_bytes=None if case.real else PLANNED_BYTES)
    changed = [] if now is None else [name for name in now if resumed.data.get(name, now[name]) != now[name]]
    if changed:
        parts = " and ".join(name.removeprefix("sha256 of ") for name in changed)
        rule = f"{parts} are not those with which {resumed.path} was written, so its place in them has no meaning"
        yield case.error("prompt_data", rule, remedy.replace("it,", "the files and their order,"), also=["load"])
