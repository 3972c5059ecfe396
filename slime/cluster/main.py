"""Turn a command line into a plan and a run, and every error of the user's into one message.

- Called by: train.py and train_async.py, which hold the training loop (the "story") and differ only in it.
- Invariant: nothing is started, and Ray is not imported, before the whole command line has been checked.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slime.cluster.local_ray import ADDRESS, address_fault, protect_local_ray
from slime.config.parse import UsageError
from slime.config.secrets import hide_command_line, masker_of
from slime.core.errors import RunError
from slime.core.masking import mask_output
from slime.observability.console.text import duration
from slime.plan.fit import load_run
from slime.plan.summary import format_plan

if TYPE_CHECKING:
    from slime.cluster.cluster import Story


def run(story: Story, argv: Sequence[str], *, rollouts_ahead: int = 0) -> None:
    """Print the plan and, without --dry-run, start a cluster and let `story` use it.

    `rollouts_ahead` is how many rollouts the story generates before the training on the present one is done; rules and
    plan depend on it. Raises SystemExit with the message for the user.
    """
    hide_command_line(argv)
    try:
        _plan_and_run(story, argv, rollouts_ahead)
    except UsageError as error:
        sys.exit(str(error))
    except RunError as error:
        if logging.getLogger().handlers:  # the traceback belongs in the run's log, if there is one yet
            logging.getLogger("slime").error("the run has ended", exc_info=error)
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; every process of the run has been ended")


def _plan_and_run(story: Story, argv: Sequence[str], rollouts_ahead: int) -> None:
    begin = time.monotonic()
    args, warnings = load_run(argv, rollouts_ahead=rollouts_ahead)
    mask_output(masker_of(args))
    if args.dry_run:
        from slime.rollout.survey import survey

        print(format_plan(args, warnings, survey(args)), flush=True)
        return
    opening = f"{format_plan(args, warnings)}\nchecking … {duration(time.monotonic() - begin)}"
    print(opening, flush=True)
    address = os.environ.get(ADDRESS)
    fault = None if not address else address_fault(address)
    if fault is not None:
        raise RunError(str(fault))
    protect_local_ray()
    from slime.cluster.restart import run_with_restarts

    run_with_restarts(args, story, begin=begin, opening=opening)
