"""Turn a command line into a plan and a run, and every error of the user's into one message.

- Called by: train.py and train_async.py, which hold the training loop (the "story") and differ only in it.
- Invariant: nothing is started, and Ray is not imported, before the whole command line has been checked.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from slime.cluster.life.resume_line import command_to_resume, program_words
from slime.cluster.life.stop import Stop
from slime.cluster.on_ray.local_ray import ADDRESS, address_fault, protect_local_ray
from slime.config.args import Args
from slime.config.eval_data import readable_eval_datasets
from slime.config.parse import UsageError
from slime.config.problem import Problem
from slime.config.resolve import OUTPUTS, in_directory
from slime.config.reward_types import runs_code
from slime.config.secrets import hide_command_line, masker_of
from slime.core.checkpoint_names import iteration_name, newest_checkpoint
from slime.core.errors import RunError
from slime.core.masking import mask_output
from slime.core.verbs import Story
from slime.observability.console.text import duration
from slime.observability.run_directory import make_directory
from slime.plan.fit import load_run
from slime.plan.summary import format_plan


def run(
    story: Story, argv: Sequence[str], *, rollouts_ahead: int = 0, after_plan: Callable[[Args], None] | None = None
) -> None:
    """Print the plan and, without --dry-run, start a cluster and let `story` use it.

    `rollouts_ahead` is how many rollouts the story generates before the training on the present one is done; rules and
    plan depend on it. `after_plan` is called at the end of a dry run. Raises SystemExit with the message for the user,
    or with a signal's status (see `stop`).
    """
    hide_command_line(argv)
    stop = Stop()
    with stop.heeded():
        try:
            _plan_and_run(story, argv, rollouts_ahead, stop, after_plan)
        except UsageError as error:
            sys.exit(str(error))
        except SystemExit as error:
            if stop.asked is None or isinstance(error.code, str):  # a text: the run has failed
                raise
            sys.exit(stop.status)


def _terminal_width() -> int | None:
    """Return the columns of the terminal that shows the plan; None if the output is a file or a pipe."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def _tried_reward(args: Args) -> list[Problem]:
    """Return the warnings of the custom reward's first call. Raises UsageError if it shows an error."""
    if args.custom_rm_path is None:
        return []
    from slime.rollout.reward_trial import errors_of, try_reward

    problems = try_reward(args)
    if errors := errors_of(problems):
        raise UsageError(errors)
    return problems


def check_sandbox(args: Args) -> None:
    """Raise UsageError if a reward runs code, and this machine does not isolate it in the way that --sandbox names."""
    sets = readable_eval_datasets(args)
    if args.custom_rm_path is not None or not any(map(runs_code, (args.rm_type, *(each.rm_type for each in sets)))):
        return
    from slime.sandbox.run import refusal

    fault = refusal(args.sandbox)
    if fault is not None:
        remedy = "allow user namespaces (docs/security.md), or accept weaker isolation with --sandbox rlimits"
        if args.sandbox == "rlimits":
            remedy = "docs/security.md lists what it needs"
        rule = f"code that the model writes cannot be isolated here: {fault}"
        problem = Problem(severity="error", where="--sandbox", value=args.sandbox, rule=rule, remedy=remedy)
        raise UsageError([problem])


def _plan_and_run(
    story: Story, argv: Sequence[str], rollouts_ahead: int, stop: Stop, after_plan: Callable[[Args], None] | None
) -> None:
    begin = time.monotonic()
    args, warnings = load_run(argv, rollouts_ahead=rollouts_ahead)
    mask_output(masker_of(args))
    warnings = [*warnings, *_tried_reward(args)]
    check_sandbox(args)
    if args.dry_run:
        from slime.rollout.survey import survey

        print(format_plan(args, warnings, survey(args), width=_terminal_width()), flush=True)
        if after_plan is not None:
            after_plan(args)
        return
    address = os.environ.get(ADDRESS)
    fault = None if not address else address_fault(address)
    if fault is not None:
        sys.exit(f"\n{fault}")
    if args.needs_directory:
        try:
            args = in_directory(args, str(make_directory(Path(OUTPUTS), args.run_name)))
        except RunError as error:
            sys.exit(f"\n{error}")
    checked = f"checking … {duration(time.monotonic() - begin)}"
    print(f"{format_plan(args, warnings, width=_terminal_width())}\n{checked}", flush=True)
    opening = f"{format_plan(args, warnings)}\n{checked}"
    try:
        _run(story, args, stop, begin, opening)
    except RunError as error:
        if logging.getLogger().handlers:  # the traceback belongs in the run's log, if there is one yet
            logging.getLogger("slime").error("the run has ended", exc_info=error)
        if stop.asked is None:
            sys.exit(f"\n{error}")
        raise SystemExit(_ending(stop, f"{stop.name} asked the run to stop, but {error}", argv, args)) from error
    except SystemExit:
        if stop.asked is not None:
            print(_ending(stop, f"{stop.name} has ended the run", argv, args), file=sys.stderr, flush=True)
        raise


def _run(story: Story, args: Args, stop: Stop, begin: float, opening: str) -> None:
    protect_local_ray()
    from slime.cluster.life.restart import run_with_restarts

    run_with_restarts(args, story, stop, begin=begin, opening=opening)


def _ending(stop: Stop, what: str, argv: Sequence[str], args: Args) -> str:
    """Return what a signal has ended, what is saved, and the command to continue with."""
    newest = newest_checkpoint(args.save) if args.num_rollout != 0 else None
    if stop.saved is not None:
        saved = f"; all that was trained is saved in {stop.saved}"
    elif args.num_rollout == 0:
        saved = ""
    elif args.save is None:
        saved = "; nothing is saved, because there is no --save"
    elif newest is None:
        saved = f"; there is no checkpoint in --save {args.save}"
    else:
        saved = f"; the last checkpoint is {Path(args.save) / iteration_name(newest)}"
    program = program_words(argv, "train-async" if args.rollouts_ahead else "train")
    return f"\n{what}{saved}\n{command_to_resume(argv, args, newest, program)}"
