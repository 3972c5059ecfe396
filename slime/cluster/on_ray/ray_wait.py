"""Waiter: the only way in which the driver waits for actors; it never waits for ever, and names them in errors.

- Called by: the driver, through `Processes.waiter`.
- Invariant: a wait ends with all results, or with an error that names the phase and the process at fault: one that
  refused (RunError), one that died, or one that did not answer in time (Fault).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from slime.cluster.life.stop import Stop, StopNoticed
from slime.cluster.life.stopped import stopped_below
from slime.core.awake import AwakeClock
from slime.core.errors import Fault, RunError

POLL_S = 1.0
LOOK_S = 5.0
"""Seconds that one round of checks takes at most while this process is awake."""
LAST_WORDS_S = 5.0
"""Seconds to learn that a process has died, after another process has failed because of that."""


class Waiter:
    """Waits for results of actors; `limit` seconds without any progress are an error.

    The error names `because`, the flag that sets the limit, and `where`, the place of the logs.
    """

    def __init__(self, *, where: str, limit: float, because: str) -> None:
        self._where = where
        self._limit, self._because = limit, because
        self._names: dict[Any, str] = {}
        self._watched: dict[Any, str] = {}
        self.between: Callable[[], object] = lambda: None
        """Called again and again during every wait. It must neither wait nor raise, and is no sign of progress."""
        self._stop: Stop | None = None
        self._say: Callable[[str], None] = print

    def heed(self, stop: Stop, say: Callable[[str], None]) -> None:
        """Let a signal end the waits that allow it; `say` announces what is finished first."""
        self._stop, self._say = stop, say

    def set_limit(self, limit: float, *, because: str) -> None:
        self._limit, self._because = limit, because

    def name(self, actor: Any, name: str) -> None:
        """Set the name that errors use for this actor."""
        self._names[actor._actor_id] = name

    def watch(self, phase: str, ref: Any) -> None:
        """Watch `ref`, which is made in the background: from now on its failure ends every wait."""
        self._watched[ref] = phase

    def unwatch(self, ref: Any) -> None:
        """Stop watching `ref`, which nobody needs any longer."""
        self._watched.pop(ref, None)

    def get(
        self,
        phase: str,
        refs: Sequence[Any],
        *,
        meanwhile: Callable[[], object] | None = None,
        every: float = POLL_S,
        give_up: bool = False,
    ) -> list[Any]:
        """Return the results of `refs` in order; the first failure ends the wait.

        `meanwhile` is called every `every` seconds. Progress is a new result, or a changed value from `meanwhile`.
        `give_up` allows a signal to end the wait before its results are there.

        Raises:
            StopNoticed: a signal has ended the wait.
            RunError: naming the phase (it may be a watched one in the background), and the error of the process that
                failed. A Fault means that it died, or that there was no progress for too long.
        """
        waiting = list(refs)
        looked = time.monotonic()
        clock = AwakeClock(LOOK_S)
        silence = 0.0
        seen: object = None
        while waiting:
            watched = [ref for ref in self._watched if ref not in waiting]
            ready, _ = ray.wait([*waiting, *watched], num_returns=1, timeout=POLL_S)
            silence += clock.tick()
            for ref in ready:
                silence = 0.0
                self._raise_failure(self._watched.pop(ref, phase), ref, waiting)
                if ref in waiting:
                    waiting.remove(ref)
            if not ready:
                self._notice(phase, give_up)
            now = time.monotonic()
            if not ready:
                self.between()
            if not ready and meanwhile is not None and now - looked >= every:
                before, seen = seen, meanwhile()
                looked = time.monotonic()
                if seen != before:
                    silence = 0.0
            if waiting and silence > self._limit:
                raise Fault(self._silent(phase, waiting))
        return ray.get(list(refs))

    def _notice(self, phase: str, give_up: bool) -> None:
        if self._stop is None or self._stop.asked is None:
            return
        doing = f"{phase} is {'aborted' if give_up else 'finished'}"
        then = "what was trained is saved, and the run ends; a second signal ends it at once, without saving"
        self._stop.announce(f"{self._stop.name}: {doing}, {then}", self._say)
        if give_up:
            raise StopNoticed

    def _silent(self, phase: str, waiting: Sequence[Any]) -> str:
        names = ", ".join(dict.fromkeys(self._who(ref) for ref in waiting))
        return (
            f"{phase}: no answer for {self._limit:g} s ({self._because}) from {names}"
            f"{stopped_below(psutil.Process())}; what it was doing may be in the logs: {self._where}"
        )

    def _who(self, ref: Any) -> str:
        return self._names.get(ref.task_id().actor_id(), "a process")

    def _raise_failure(self, phase: str, ref: Any, waiting: Sequence[Any]) -> None:
        try:
            ray.get(ref)
        except RayTaskError as error:
            for other in self._dead([one for one in waiting if one != ref]):
                raise self._lost(phase, other, error) from error  # this one died, and the first failed because of it
            cause = error.cause if isinstance(error.cause, BaseException) else error
            message = str(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {cause}"
            kind = Fault if isinstance(cause, Fault | RayError) or is_broken_link(cause) else RunError
            raise kind(f"{phase} failed: {self._who(ref)}: {message}\nlogs: {self._where}") from error
        except RayError as error:
            raise self._lost(phase, ref, error) from error

    def _dead(self, refs: Sequence[Any]) -> list[Any]:
        """Return those of `refs` whose process is gone; the others get a moment to fail, too."""
        if not refs:
            return []
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=LAST_WORDS_S)
        dead: list[Any] = []
        for ref in done:
            try:
                ray.get(ref)
            except RayTaskError:
                continue
            except RayError:
                dead.append(ref)
        return dead

    def _lost(self, phase: str, ref: Any, error: RayError) -> Fault:
        reason = " ".join(str(error).split())
        return Fault(f"{phase} failed: {self._who(ref)} died\n{reason}\nlogs: {self._where}")


def is_broken_link(error: BaseException) -> bool:
    """Return whether the error is a collective that lost a peer, which may be on another node."""
    by_torch = any(kind.__name__ == "DistError" and kind.__module__.startswith("torch") for kind in type(error).__mro__)
    return by_torch or (type(error) is RuntimeError and "gloo/transport" in str(error))
