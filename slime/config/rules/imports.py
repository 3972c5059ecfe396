"""The import of a user's hook within a time limit, and the rules for installed packages: trackers and Megatron.

- Used by: `files.hooks` and `rewards.custom_reward`; `rules.check`.
- Invariant: a module that hangs during its import leads to an error that names its flag.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from importlib.util import find_spec
from types import FrameType
from typing import Any

from slime.config.experiment_trackers import TRACKERS
from slime.config.megatron_version import megatron_fault
from slime.config.problem import Problem
from slime.config.rules.case import Case
from slime.core.plugins import HOOKS, HookError, load_hook
from slime.core.printable import printable
from slime.core.user_code import split_path

IMPORT_LIMIT = 60.0
"""The time limit in seconds. An import of torch and transformers from a cold disk takes half of it."""
_NOTICE = 10.0
"""Seconds after which the console names the import that is still running."""
_HUNG: set[str] = set()
"""Modules whose import did not end in time; no other hook or rule waits for them again."""


class _TooSlow(BaseException):
    """The import takes too long. It is not an Exception, so that the imported module does not catch it."""


def import_hook(name: str, path: str) -> Callable[..., Any]:
    """Call `plugins.load_hook` within IMPORT_LIMIT seconds.

    Raises:
        HookError: the hook cannot be loaded (see load_hook), or its import did not end in time.
    """
    flag, module = HOOKS[name].flag, split_path(path)[0]
    too_slow = HookError(
        flag,
        path,
        f"its import has not finished after {IMPORT_LIMIT:g} s",
        "move code that is slow or waits from the module's top level into the function",
    )
    if module in _HUNG:
        raise too_slow
    try:
        with _limit(f"{flag} {printable(path)}: still importing it"):
            return load_hook(name, path)
    except _TooSlow:
        _HUNG.add(module)
        raise too_slow from None


@contextlib.contextmanager
def _limit(notice: str) -> Generator[None]:
    """Print `notice` after a while and raise _TooSlow at the limit.

    It does nothing outside the main thread, because only that thread receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    remaining = [IMPORT_LIMIT - _NOTICE]

    def tick(number: int, frame: FrameType | None) -> None:
        if not remaining:
            raise _TooSlow
        print(notice, file=sys.stderr, flush=True)
        signal.setitimer(signal.ITIMER_REAL, remaining.pop())

    handler = signal.signal(signal.SIGALRM, tick)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, min(_NOTICE, IMPORT_LIMIT))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, delay, interval)
        signal.signal(signal.SIGALRM, handler)


def trackers(case: Case) -> Iterable[Problem]:
    """Check that the packages of the run's trackers are installed and can be used."""
    for name in case.args.tracker_names:
        facts = TRACKERS[name]
        field = facts.switch if facts.switch in case.given else "trackers"
        if facts.package is not None and not is_installed(facts.package):
            remedy = f"pip install 'slime[{facts.package}]'"
            yield case.missing(field, f"{facts.package} is not installed", remedy)
        elif case.real and (fault := facts.fault()) is not None:
            yield case.error(field, *fault)


def megatron_version(case: Case) -> Iterable[Problem]:
    """Check that training would import the supported megatron-core; a --dry-run needs none."""
    fault = megatron_fault()
    if fault is None or (fault.is_missing and not case.real):
        return
    severity = "error" if case.real else "warning"
    yield Problem(severity=severity, where=fault.where, rule=fault.rule, remedy=fault.remedy)


def is_installed(name: str) -> bool:
    """Return whether a package is installed. A plain directory of that name (W&B makes ./wandb) does not count."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
