"""Call a custom reward once, on the first data row with a canned response, before anything starts.

- Called by: `cluster.main`, for a run and for a plan whose data is on this machine.
- Invariant: the call runs in a reward worker under --rm-timeout, so nothing that it does can stop the plan. Its side
  effects are real: a reward that writes a file or calls a judge does so once.

What it returns does not depend on the response in form, so a wrong form is an error. An exception may depend on it (a
judge that is not up yet, a response that cannot be parsed), so it is a warning, with the end of its traceback.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from slime.config.args import Args
from slime.config.data_files import read_rows, split_slice
from slime.config.data_paths import data_paths
from slime.config.data_rows import DataError, DataKeys, Row
from slime.config.problem import Problem
from slime.config.prompt_format import PromptFormat
from slime.core.plugins import HookError
from slime.core.sample import Sample, Status
from slime.core.small_files import is_file
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import CRASH, ERROR, MEMORY, NO_ENTRY, NOT_A_NUMBER, failure_kind

_LAST_LINES = 4
"""Lines of a traceback that are shown."""
_WRONG_FORM = {failure_kind(kind) for kind in (NO_ENTRY, NOT_A_NUMBER, CRASH, MEMORY)}


def try_reward(args: Args) -> list[Problem]:
    """Return what is wrong with each custom reward, as its first call shows; empty without one, or without data."""
    sample = _first_sample(args)
    if sample is None:
        return []
    alone = [replace(args, custom_rm_path=path) for path in args.reward_paths]
    return [problem for each in alone for problem in _try_one(each, sample.copy())]


def _try_one(args: Args, sample: Sample) -> list[Problem]:
    """Try the one function of --custom-rm-path."""
    with tempfile.TemporaryDirectory(prefix="slime-reward-") as folder:
        try:
            judged = asyncio.run(_judged(args, sample, Path(folder)))
        except HookError:  # the rules report it
            return []
        except RuntimeError as error:  # the worker did not start
            return [_problem(args, "error", str(error), "correct the function")]
        logs = "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("*.log")))
    return [problem for problem in [_fault(args, judged, logs)] if problem is not None]


def _first_sample(args: Args) -> Sample | None:
    """Return the first row of --prompt-data with a canned response; None if the run judges none of its rows."""
    unjudged = args.loss_type == "sft_loss" or args.debug_train_only or args.load_debug_rollout_data is not None
    if args.prompt_data is None or args.has_own_data_source or args.num_rollout == 0 or unjudged:
        return None
    keys = DataKeys.of(args, input_key=args.resolved.input_key, label_key=args.label_key)
    try:
        paths = data_paths(args.prompt_data)
    except DataError:  # a warning of the plan reports it
        return None
    if not paths or not is_file(split_slice(paths[0])[0]):
        return None
    for row in islice(read_rows(paths[0], keys), 1):
        if isinstance(row, Row):
            prompt, label = PromptFormat.of(args).prompt(keys.prompt(row.data)), keys.label(row.data)
            return _answered(prompt, label, keys, row)
    return None


def _answered(prompt: object, label: str | None, keys: DataKeys, row: Row) -> Sample:
    """Return a finished sample of the row, whose response states the label in the usual forms."""
    response = f"</think>\nThe answer is {label or 42}.\nAnswer: \\boxed{{{label or 42}}}"
    count = len(response)
    return Sample(
        prompt=prompt,  # pyright: ignore[reportArgumentType]
        label=label,
        response=response,
        tokens=[0] * (count + 1),
        prompt_length=1,
        response_length=count,
        rollout_log_probs=[0.0] * count,
        policy_versions=[0] * count,
        status=Status.COMPLETED,
        metadata={**keys.metadata(row.data), "start_rollout_id": 0},
        row=row.data,
    )


async def _judged(args: Args, sample: Sample, folder: Path) -> Sample:
    pool = RewardPool(replace(args, rm_num_workers=1), folder)
    try:
        if pool.by_group:
            group = [replace(sample.copy(), index=index) for index in range(args.resolved.n_samples_per_prompt)]
            await pool.judge_group(group)
            return next((one for one in group if one.reward_failure is not None), group[0])
        (await pool.judge(sample)).apply(sample)
        return sample
    finally:
        pool.close()


def _fault(args: Args, sample: Sample, logs: str) -> Problem | None:
    failure = sample.reward_failure
    if failure is None:
        try:
            sample.reward_value(args.reward_key)
        except ValueError as error:
            rule = str(error).removeprefix(f"sample {sample.index}: ")
            return _problem(args, "error", rule, "add --reward-key, or return a number")
        return None
    is_wrong = failure_kind(failure) in _WRONG_FORM or failure.startswith(f"{ERROR}: it returned ")
    is_form = is_wrong and args.custom_generate_function_path is None
    lines = [line.partition(": ")[2] if line.startswith(("sample ", "group ")) else line for line in logs.splitlines()]
    ends = [line.strip() for line in lines if line.strip()][-_LAST_LINES:-1]  # the last line is the failure again
    rule = f"{failure} [{' | '.join(ends)}]" if failure_kind(failure) == failure_kind(ERROR) and ends else failure
    remedy = "correct the reward" if is_form else "in a run, such samples fail (--max-reward-failures)"
    return _problem(args, "error" if is_form else "warning", rule, remedy)


def _problem(args: Args, severity: str, rule: str, remedy: str) -> Problem:
    return Problem(
        severity="error" if severity == "error" else "warning",
        where="--custom-rm-path",
        value=str(args.custom_rm_path),
        rule=f"called on the first row with a canned response: {rule}",
        remedy=remedy,
        fields=frozenset(["custom_rm_path"]),
    )


def errors_of(problems: Sequence[Problem]) -> list[Problem]:
    """Return the errors among problems."""
    return [problem for problem in problems if problem.severity == "error"]
