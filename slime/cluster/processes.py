"""The processes of a run: started in order, waited for by name, and all ended when the run ends.

Path: `Cluster` holds one of these and calls its actors. Invariant: after `stop`, nothing that `start` started is
alive, however far it came and however the run ended; nothing else is touched.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from slime.cluster.placement import Placement, reserve, start_ray
from slime.cluster.rollout_manager import RolloutManager
from slime.cluster.workers import EngineWorker, TrainWorker
from slime.config.args import Args
from slime.core.errors import RunError

if TYPE_CHECKING:
    from slime.megatron.result import LoadResult

STOP_TIMEOUT_S = 15.0
logger = logging.getLogger(__name__)


class Processes:
    """Ray actors by role. `trainers[rank]`, `engines[index]`, `manager`."""

    def __init__(self, args: Args, log_dir: Path) -> None:
        self._args = args
        self._log_dir = log_dir.absolute()
        self._placement: Placement | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._tmp = tempfile.TemporaryDirectory(prefix="slime-run-")
        self.manager: Any = None
        self.trainers: list[Any] = []
        self.engines: list[Any] = []

    def start(self) -> None:
        """Ray and all actors; returns while they are still importing."""
        args, log_dir = self._args, str(self._log_dir)
        self._reaper = start_ray()
        self._placement = place = reserve(args)
        self.manager = ray.remote(RolloutManager).options(**place.manager()).remote(args, log_dir)
        self._manager_started = self.manager.start.remote()
        self.engines = [
            EngineWorker.options(**place.engine(index)).remote(args, index, log_dir)
            for index in range(place.num_engines)
        ]
        self._engine_urls = [engine.start.remote() for engine in self.engines]
        rendezvous = f"file://{self._tmp.name}/rendezvous"
        self.trainers = [
            TrainWorker.options(**place.trainer(rank)).remote(args, rank, rendezvous, log_dir)
            for rank in range(place.num_trainers)
        ]

    def load(self) -> tuple[LoadResult | None, list[str]]:
        """What the trainers loaded (None without trainers), and warnings; the prompts are loaded then, too."""
        loaded = self.get("loading the model", [trainer.load.remote() for trainer in self.trainers])
        [warnings] = self.get("loading the prompts", [self._manager_started])
        if not loaded:
            return None, warnings
        result, of_rank_zero = loaded[0]
        return result, of_rank_zero + warnings

    def connect(self) -> None:
        """Wait for the engines, put them behind the router, and join trainers and engines in one weight group."""
        if not self.engines:
            return
        manager = self.manager
        router_url = self.get("starting the router", [manager.start_router.remote()])[0]
        urls = self.get("starting the engines", self._engine_urls)
        self.get("registering the engines", [manager.connect_engines.remote(router_url, urls, self.engines)])
        self.get(
            "joining the weight group",
            [trainer.connect_engines.remote(router_url, len(urls)) for trainer in self.trainers],
        )

    def get(self, phase: str, refs: Sequence[Any]) -> list[Any]:
        """The results of `refs`, in order; the first failure ends the wait.

        Raises:
            RunError: naming the phase, and what the process that failed said or that it died.
        """
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            try:
                ray.get(ready)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, BaseException) else error
                raise RunError(f"{phase} failed: {type(cause).__name__}: {cause}\nlogs: {self._log_dir}") from error
            except RayActorError as error:
                raise RunError(f"{phase} failed: a process died: {error}\nlogs: {self._log_dir}") from error
        return ray.get(list(refs))

    def stop(self) -> None:
        """End everything that `start` started."""
        if ray.is_initialized():
            self._stop_children()
            for actor in (*self.trainers, *self.engines, self.manager):
                if actor is not None:
                    ray.kill(actor)
            if self._placement is not None:
                self._placement.release()
            ray.shutdown()
        if self._reaper is not None:
            self._reaper.communicate(timeout=STOP_TIMEOUT_S)
        self._tmp.cleanup()

    def _stop_children(self) -> None:
        """Ask the owners of engine and router processes to end them; their guards do it where the owner cannot."""
        closing = [engine.stop.remote() for engine in self.engines]
        if self.manager is not None:
            closing.append(self.manager.close.remote())
        done, late = ray.wait(closing, num_returns=len(closing), timeout=STOP_TIMEOUT_S) if closing else ([], [])
        for ref in done:
            try:
                ray.get(ref)
            except RayError as error:
                logger.warning("stopping: %s", error)
        if late:
            logger.warning("stopping: %d processes did not answer within %.0f s", len(late), STOP_TIMEOUT_S)
