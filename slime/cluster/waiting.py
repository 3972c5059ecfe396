"""The driver's one way to wait: for results of actors, each known by name, and never for ever.

Path: `Processes.get` is this. Invariant: a wait ends with all results or with an error that names the phase and who is
to blame: one that said no (RunError), one that died, or one that has not answered in time (Fault).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from slime.cluster.stopped import stopped_below
from slime.core.awake import AwakeClock
from slime.core.errors import Fault, RunError

POLL_S = 1.0
LOOK_S = 5.0
"""Seconds that one look at everything takes at most while this process is awake."""
LAST_WORDS_S = 5.0
"""Seconds for a process that has died to be known as dead, after another has failed for the lack of it."""


class Waiter:
    """`limit`: seconds of a wait in which nothing moves; then it is an error, which names it `because`. `where`: the
    logs, for messages."""

    def __init__(self, *, where: str, limit: float, because: str) -> None:
        self._where = where
        self._limit, self._because = limit, because
        self._names: dict[Any, str] = {}
        self._behind: dict[Any, str] = {}

    def set_limit(self, limit: float, *, because: str) -> None:
        self._limit, self._because = limit, because

    def name(self, actor: Any, name: str) -> None:
        """Give this actor the name that errors call it by."""
        self._names[actor._actor_id] = name

    def watch(self, phase: str, ref: Any) -> None:
        """`ref` is made behind the loop: from now on its failure ends whatever is waited for."""
        self._behind[ref] = phase

    def get(
        self,
        phase: str,
        refs: Sequence[Any],
        *,
        meanwhile: Callable[[], object] | None = None,
        every: float = POLL_S,
    ) -> list[Any]:
        """The results of `refs`, in order; the first failure ends the wait.

        `meanwhile`: called every so many seconds. Something moves when a result comes, or it returns another value.

        Raises:
            RunError: naming the phase (it may be one that goes on behind the loop), and what the process that failed
                said. A Fault: it died, or nothing has moved for too long.
        """
        waiting = list(refs)
        looked = time.monotonic()
        clock = AwakeClock(LOOK_S)
        silence = 0.0
        seen: object = None
        while waiting:
            behind = [ref for ref in self._behind if ref not in waiting]
            ready, _ = ray.wait([*waiting, *behind], num_returns=1, timeout=POLL_S)
            silence += clock.tick()
            for ref in ready:
                silence = 0.0
                self._raise_failure(self._behind.pop(ref, phase), ref, waiting)
                if ref in waiting:
                    waiting.remove(ref)
            now = time.monotonic()
            if not ready and meanwhile is not None and now - looked >= every:
                before, seen = seen, meanwhile()
                looked = time.monotonic()
                if seen != before:
                    silence = 0.0
            if waiting and silence > self._limit:
                raise Fault(self._silent(phase, waiting))
        return ray.get(list(refs))

    def _silent(self, phase: str, waiting: Sequence[Any]) -> str:
        names = ", ".join(dict.fromkeys(self._who(ref) for ref in waiting))
        return (
            f"{phase}: no answer for {self._limit:g} s ({self._because}) from {names}"
            f"{stopped_below(psutil.Process())}; what it was doing may stand in the logs: {self._where}"
        )

    def _who(self, ref: Any) -> str:
        return self._names.get(ref.task_id().actor_id(), "a process")

    def _raise_failure(self, phase: str, ref: Any, waiting: Sequence[Any]) -> None:
        try:
            ray.get(ref)
        except RayTaskError as error:
            for other in self._dead([one for one in waiting if one != ref]):
                raise self._lost(phase, other, error) from error  # the first one failed for the lack of it
            cause = error.cause if isinstance(error.cause, BaseException) else error
            said = str(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {cause}"
            kind = Fault if isinstance(cause, Fault | RayError) or is_broken_link(cause) else RunError
            raise kind(f"{phase} failed: {self._who(ref)}: {said}\nlogs: {self._where}") from error
        except RayError as error:
            raise self._lost(phase, ref, error) from error

    def _dead(self, refs: Sequence[Any]) -> list[Any]:
        """The ones of `refs` whose process is gone; the others have a moment to fail, too."""
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
    """A collective that has lost a peer, which may be one of another node."""
    by_torch = any(kind.__name__ == "DistError" and kind.__module__.startswith("torch") for kind in type(error).__mro__)
    return by_torch or (type(error) is RuntimeError and "gloo/transport" in str(error))
