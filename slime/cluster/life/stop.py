"""Stop: a run that a signal ends saves what it has trained, and the run that resumes continues exactly there.

- Used by: `main` makes one for a run and handles SIGINT (Ctrl-C) and SIGTERM with it. `Cluster` tells it whether there
  is anything to save, and looks at it between and within its verbs.
- Invariant: the handler does nothing but record the signal, or raise. Everything else happens in the driver's loop.

The first signal, by what the run is doing, and what the resumed run does:

    phase of the signal           what happens, and what is saved            the resumed run
    ----------------------------  -----------------------------------------  --------------------------------------
    start-up, first weight sync,  it ends at once: nothing has been trained  starts again as this one did
      first generation or eval.     since the start
    generation of N, evaluation   it ends at once: N - 1 is saved            generates N, runs the evaluation, again
      after N - 1, N - 1 saved
    generation of N, not saved    generation is aborted; the state after     generates N again, from the same prompts
                                    N - 1, with the groups drawn for N
    evaluation after N, not saved it is aborted; the state after N           runs the evaluation again
    training on N                 it is finished; the state after N          generates N + 1
    save after N, and its write   both are finished (a rollout or an         generates N + 1
      while the run goes on         evaluation meanwhile is aborted)
    weight sync after N           it is finished; the state after N, with    sends the weights, generates N + 1
                                    the policy version before the sync
    any, without --save           it ends at once: nothing can be saved      starts again from the beginning

With `train_async` rollout N + 1 is generated meanwhile. It is aborted, and its groups are saved as in flight, except
with --deterministic: half of a rollout cannot be continued bit by bit after newer weights, so the save waits until it
is whole, as every save does. A rollout that is whole is saved with the state; one that turns out to be whole when it
should be aborted is trained on (`train`) or saved (`train_async`).

A save because of a signal leaves out --save-hf if no save was due, because SIGKILL may follow: Slurm and Kubernetes
wait 30 s by default. A second signal ends the run at once and saves nothing, in every phase; a checkpoint that is being
written gets its name only when it is complete. Signals within REPEAT_S count as one, because `timeout`, `uv run` and
others pass on a signal that has reached the whole process group already.

The exit status is 128 + the signal's number, 130 or 143, also after a save: a run that was stopped is not complete.
With status 0, Kubernetes would count the job as done and Slurm would start the jobs that wait for its success.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

HEEDED = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 0.5
"""Seconds in which repeated signals count as one."""


class Stopped(SystemExit):
    """Ends the run because of a signal. `Stop` knows which, and what was saved: Ray passes on a bare SystemExit."""


class StopNoticed(Exception):
    """Ends a wait that may be given up, so that the state can be saved."""


class Stop:
    """A request to stop, made by a signal: none yet, one that waits for a save, or one that ends the run at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """The first signal."""
        self.saved: str | None = None
        """The checkpoint that was written because of it."""
        self._last_time = -REPEAT_S
        self._holds = False
        self._announced = False
        self._heeded: list[signal.Signals] = []

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Handle the signals in the block. One that this process ignores stays ignored, as with `nohup`."""
        before = {number: signal.getsignal(number) for number in HEEDED}
        self._heeded = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Set the handlers, again after Ray has replaced them with its own."""
        for number in self._heeded:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last_time < REPEAT_S:
            return
        self._last_time = now
        first = self.asked is None
        if first:
            self.asked = signal.Signals(number)
        if not (first and self._holds):
            raise Stopped(self.status)

    @property
    def name(self) -> str:
        """The first signal as the user knows it."""
        return "Ctrl-C" if self.asked is signal.SIGINT else "SIGTERM"

    @property
    def status(self) -> int:
        """The exit status of a run that a signal has ended."""
        return 128 + (self.asked or signal.SIGTERM)

    def announce(self, text: str, say: Callable[[str], None]) -> None:
        """Say once what happens until the run ends."""
        if not self._announced:
            self._announced = True
            say(text)

    def hold(self) -> None:
        """Let the first signal wait from now on: there is something to save, which must be finished first."""
        self._holds = True

    def let_go(self, saved: str | None) -> None:
        """Let a signal end the run at once from now on, because everything is saved; `saved` is the checkpoint.

        Raises:
            Stopped: a signal has waited for this.
        """
        self._holds = False
        if self.asked is not None:
            self.saved = saved
            raise Stopped(self.status)
