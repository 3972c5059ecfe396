"""The run's Ray, and what guards it: temporary files, the reaper and the watchdog.

- Called by: `running_processes` starts all actors inside `ray_session`.
- Invariant: after the block, no process is alive that was started in it, however far the start came and however the
  block ended. No other process is touched.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import ray

from slime.cluster.life.reaper import Reaper
from slime.cluster.life.run_files import RunFiles
from slime.cluster.life.stopped import stopped_below
from slime.cluster.life.watchdog import Watchdog
from slime.cluster.on_ray.placement import addresses_of_ray, start_ray
from slime.config.args import Args
from slime.core.marks import new_mark

LAST_LOOK_S = 5.0
START_TIMEOUT_S = 180.0
"""Seconds for Ray to start, or for the run to join it."""
END_TIMEOUT_S = 60.0
"""Seconds for a run to end."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RaySession:
    """A Ray that runs, with the run's temporary `directory` and the watchdog of both."""

    directory: Path
    watchdog: Watchdog

    def expect_end(self) -> None:
        """Expect the run to end within END_TIMEOUT_S from now on."""
        self.watchdog.expect("ending the run", END_TIMEOUT_S)


@contextmanager
def ray_session(args: Args, log_dir: Path, *, silence: float) -> Iterator[RaySession]:
    """Start Ray for the block, or join the one at RAY_ADDRESS.

    If the block ends without an error, nothing has failed, so Ray's logs are not kept.

    Args:
        args: the run, whose rollouts a local Ray's object store has to hold.
        log_dir: where the logs of Ray's processes are kept after an error.
        silence: seconds without an answer of Ray's own processes, after which the watchdog ends the run.

    Raises:
        RunError: Ray does not start.
    """
    with ExitStack() as cleanup:
        mark = new_mark()
        files = RunFiles(mark)
        cleanup.callback(files.close)
        reaper = Reaper(mark, files, log_dir)
        cleanup.push(reaper.leave)
        watchdog = Watchdog(limit=silence, end=partial(_end_at_once, reaper, log_dir))
        cleanup.callback(watchdog.close)
        session = RaySession(files.path, watchdog)
        own: list[psutil.Process] = []  # the processes of a local Ray; the actors are their children
        cleanup.callback(_shut_down, session, own)
        watchdog.expect("starting or joining Ray", START_TIMEOUT_S)
        before = set(psutil.Process().children())
        directory = start_ray(args)
        if directory is not None:
            own += [process for process in psutil.Process().children() if process not in before]
            files.record(directory)
            reaper.tell(f"session {directory}")
        watchdog.watch(addresses_of_ray())
        watchdog.expect_nothing()
        yield session


def _shut_down(session: RaySession, own: Sequence[psutil.Process]) -> None:
    session.expect_end()
    if ray.is_initialized():
        actors = _children(own)
        session.watchdog.stop_asking()
        ray.shutdown()
        _end(actors)


def _end_at_once(reaper: Reaper, log_dir: Path, trouble: str) -> None:
    """End the run and this process from the watchdog's thread, because the main thread's calls of Ray hang.

    The reaper ends what the run has started, this process's children and stopped processes too. A Ray that the run
    joined is left alone; it ends the run's actors when it continues.
    """
    message = (
        f"{trouble}{stopped_below(psutil.Process())}: the run has ended; started again, it goes on from its last "
        f"checkpoint\nlogs: {log_dir}"
    )
    logger.error("%s", message)
    print(f"\n{message}", file=sys.stderr, flush=True)
    reaper.finish()
    os._exit(1)


def _children(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return found


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait until the processes end, then kill the rest; a stopped one (SIGSTOP) reacts only to SIGKILL."""
    _, left = psutil.wait_procs(processes, timeout=LAST_LOOK_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
