"""ProgressPoll: fetch the rollout manager's progress for the console while the driver waits for something else.

- Called by: the `Waiter`, between two looks at what it waits for.
- Invariant: it never waits and never raises, because a run must not end for want of a progress bar. A late answer is
  fetched at a later call. After a failure it warns once and stops asking. If the manager has died, it says nothing: the
  call that the driver waits for reports that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from slime.observability.progress import WorkProgress

logger = logging.getLogger(__name__)


class ProgressPoll:
    """Asks `manager` at most every `every` seconds, and passes the answers to `show`; `warn` shows a line."""

    def __init__(
        self, manager: Any, *, show: Callable[[WorkProgress], None], warn: Callable[[str], None], every: float
    ) -> None:
        self._manager = manager
        self._show, self._warn = show, warn
        self._every = every
        self._asked: Any = None
        self._next = 0.0
        self._failed = False

    def look(self) -> None:
        """Take the answer if it is there, and ask again if it is time."""
        if self._failed:
            return
        try:
            self._step()
        except RayActorError:
            self._asked = None  # the manager has died, and the driver's own wait for it reports that
        except RayError as error:
            self._failed = True
            logger.warning("the rollout manager cannot count its progress", exc_info=error)
            self._warn("WARNING the progress of rollouts cannot be shown any more; logs/driver.log has the reason")

    def _step(self) -> None:
        if self._asked is not None:
            ready, _ = ray.wait([self._asked], timeout=0)
            if not ready:
                return
            asked, self._asked = self._asked, None
            self._show(ray.get(asked))
        if time.monotonic() >= self._next:
            self._asked = self._manager.progress.remote()
            self._next = time.monotonic() + self._every
