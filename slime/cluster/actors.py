"""The processes of a run: started in order, waited for by name, and all ended when the run ends.

- Used by: `Cluster` holds one of these and calls its actors.
- Invariant: after `stop`, no process that `start` started is alive, however far the start came and however the run
  ended. No other process is touched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import RayError

from slime.cluster.engine_supervisor import EngineUp
from slime.cluster.placement import (
    Placement,
    addresses_of_ray,
    choose_engine,
    num_gpus,
    num_nodes,
    reserve,
    start_ray,
)
from slime.cluster.ray_wait import POLL_S, Waiter
from slime.cluster.reaper import Reaper
from slime.cluster.rollout_manager import RolloutManager
from slime.cluster.run_files import RunFiles
from slime.cluster.stopped import stopped_below
from slime.cluster.watchdog import Watchdog
from slime.cluster.workers import EngineWorker, TrainWorker
from slime.config.args import Args
from slime.config.epochs import rollouts_of_epochs
from slime.config.parse import schedule_problems
from slime.core.errors import RunError
from slime.core.marks import new_mark
from slime.engine.external import FoundEngines, find_engines
from slime.engine.keys import Keys, with_keys
from slime.engine.kinds.kind import check_here, kind_of
from slime.engine.membership import Membership, external_router_url
from slime.sync.weight_directory import WeightDirectory

if TYPE_CHECKING:
    from slime.core.load_result import LoadResult

STOP_TIMEOUT_S = 15.0
LAST_LOOK_S = 5.0
START_TIMEOUT_S = 180.0
"""Seconds for Ray to start, or for the run to join it."""
END_TIMEOUT_S = 60.0
"""Seconds for a run to end."""
SILENT_S = 30.0
"""The least silence of Ray's own processes, in seconds, that is tolerated: a loaded machine is not a dead one."""
PROGRESS_S = 10.0
OPEN_ROUTER = (
    "the router at {url} requires no key for its list of engines: whoever reaches it can add one, which ends the run "
    "only after it was sent prompts; start it with --control-plane-api-keys ID:NAME:admin:KEY, and give the run "
    "--router-control-plane-api-keys with the same"
)
logger = logging.getLogger(__name__)


class Processes:
    """Ray actors by role: `trainers[rank]`, `engines[index]`, `manager`."""

    def __init__(self, args: Args, log_dir: Path) -> None:
        self._args = args = with_keys(args)
        self._log_dir = log_dir.absolute()
        self._placement: Placement | None = None
        self._mark = new_mark()
        self._files = RunFiles(self._mark)
        self._reaper: Reaper | None = None
        self._watchdog: Watchdog | None = None
        self._rays_own: list[psutil.Process] = []
        """The processes of a local Ray; the actors are their children."""
        self._weights: WeightDirectory | None = None
        self._external: FoundEngines | None = None
        self.manager: Any = None
        self.trainers: list[Any] = []
        self.engines: list[Any] = []
        self._router_url = ""
        self._urls: list[str] = []
        self._ranks: list[int] = []
        starts = max((args.phase_timeout, "--phase-timeout"), (args.engine_start_timeout, "--engine-start-timeout"))
        self._waiter = Waiter(where=str(self._log_dir), limit=starts[0], because=starts[1])

    def start(self) -> None:
        """Start Ray and all actors; this returns while the actors are still importing."""
        log_dir = str(self._log_dir)
        self._take_what_is_shared()
        self._reaper = Reaper(self._mark, self._files, self._log_dir)
        self._watchdog = Watchdog(limit=max(SILENT_S, self._args.engine_health_timeout), end=self._end_at_once)
        self._watchdog.expect("starting or joining Ray", START_TIMEOUT_S)
        before = set(psutil.Process().children())
        session = start_ray()
        if session is not None:
            self._rays_own = [p for p in psutil.Process().children() if p not in before]
            self._files.record(session)
            self._reaper.tell(f"session {session}")
        self._watchdog.watch(addresses_of_ray())
        self._watchdog.expect_nothing()
        args = choose_engine(self._args, num_gpus())
        self._placement = place = reserve(args)
        self.manager = ray.remote(RolloutManager).options(**place.manager()).remote(args, log_dir)
        self._waiter.name(self.manager, "the rollout manager")
        self._manager_started = self.manager.start.remote()
        near = num_nodes() == 1
        self.engines = [
            # Ray restarts an owner whose process dies, in the same place; the new owner then restarts the engine.
            EngineWorker.options(max_concurrency=4, max_restarts=-1, **place.engine(index)).remote(
                args, index, log_dir, place.engine_gpu_ids(index), near=near
            )
            for index in range(place.num_engines)
        ]
        for index, engine in enumerate(self.engines):
            self._waiter.name(engine, f"the owner of engine {index}")
        kind = kind_of(args)
        if kind.check is not None:
            self.get(f"checking {args.engine.label}", [engine.check.remote() for engine in self.engines])
        self._engines_begin = time.monotonic()
        self._engine_urls = [engine.start.remote() for engine in self.engines]
        if args.colocate and not args.offload and kind.takes_free_memory:
            self._wait_for_engines()  # trainers would take a part of the memory that it sizes itself by
        self.num_rollouts = self._count_rollouts()
        args = replace(args, num_rollout=self.num_rollouts)  # a learning rate schedule needs to know its length
        rendezvous = place.rendezvous(str(self._files.path))
        self.trainers = [
            TrainWorker.options(**place.trainer(rank)).remote(args, rank, rendezvous, log_dir)
            for rank in range(place.num_trainers)
        ]
        for rank, trainer in enumerate(self.trainers):
            self._waiter.name(trainer, f"trainer {rank} (its log is {self._log_dir / f'trainer-{rank}.log'})")

    def _wait_for_engines(self) -> list[str]:
        """Return the engines' URLs once all are ready; print their phases now and then meanwhile."""

        def say_phases() -> None:
            phases = self.get("asking the engines", [engine.phase.remote() for engine in self.engines])
            each = [f"engine {index} {phase}" for index, phase in enumerate(phases)]
            seconds = time.monotonic() - self._engines_begin
            print(f"starting the engines, {seconds:.0f} s: {', '.join(each)}", flush=True)

        return self.get("starting the engines", self._engine_urls, meanwhile=say_phases, every=PROGRESS_S)

    def _count_rollouts(self) -> int:
        """Return --num-rollout, or the number of rollouts in --num-epoch with the prompts that were kept.

        Raises:
            RunError: the learning rate's schedule does not fit into that number.
        """
        args = self._args
        if args.num_rollout is not None:
            return args.num_rollout
        self.get("loading the prompts", [self._manager_started])
        [num_prompts] = self.get("counting the prompts", [self.manager.num_prompts.remote()])
        num_rollouts = rollouts_of_epochs(args, num_prompts)
        for problem in schedule_problems(replace(args, num_rollout=num_rollouts)):
            raise RunError(str(problem))
        return num_rollouts

    def _take_what_is_shared(self) -> None:
        """Check external engines and router, and lock the weight directory, before the run starts any process.

        Raises:
            RunError: one of them does not answer, serves another model, or belongs to another run.
        """
        args = self._args
        router_url = external_router_url(args)
        try:
            check_here(args)  # where the engine is not installed on the driver, the nodes check theirs
            if args.rollout_external_engines and args.num_engines:
                self._external = asyncio.run(find_engines(args, say=print))
            if router_url is not None and args.num_engines:
                router = Membership(router_url, keys=Keys.of(args), timeout=args.engine_start_timeout)
                router.wait_ready()
                if router.is_open():
                    print(f"WARNING {OPEN_ROUTER.format(url=router_url)}", flush=True)
                router.refuse_others(args.rollout_external_engines)
            if args.writes_weight_files:
                self._weights = WeightDirectory(Path(args.resolved.update_weight_disk_dir))
        except (OSError, RuntimeError, ValueError) as error:
            raise RunError(str(error)) from error

    def load(self) -> tuple[LoadResult | None, list[str]]:
        """Wait for trainers and prompts; return what was loaded (None without trainers), and warnings."""
        loaded = self.get("loading the model", [trainer.load.remote() for trainer in self.trainers])
        [warnings] = self.get("loading the prompts", [self._manager_started])
        if self._external is not None:
            warnings = [*warnings, *self._external.warnings]
        if not loaded:
            return None, warnings
        result, of_rank_zero = loaded[0]
        return result, of_rank_zero + warnings

    @property
    def colocated(self) -> bool:
        """Whether engines use the trainers' devices."""
        return self._args.colocate

    @property
    def has_engines(self) -> bool:
        """Whether there is any engine to generate with."""
        return self._args.num_engines > 0

    def connect_engines(self) -> None:
        """Wait for the engines, and register them with the router."""
        manager, place = self.manager, self._placement
        assert place is not None, "start comes first"
        self._router_url = self.get("starting the router", [manager.start_router.remote()])[0]
        if self._external is None:
            self._urls = self._wait_for_engines()
            self._ranks = [place.want.gpus_per_engine or 1] * len(self._urls)
        else:
            self._urls, self._ranks = list(self._args.rollout_external_engines), list(self._external.num_ranks)
        refs = [manager.connect_engines.remote(self._router_url, self._urls, self.engines)]
        self.get("registering the engines", refs)

    def connect_trainers(self, engines: Sequence[EngineUp]) -> None:
        """Connect trainers and these engines for weight syncs; other engines get no weights from then on."""
        assert self._placement is not None, "start comes first"
        urls = [engine.url for engine in engines]
        ranks = [self._ranks[engine.index] for engine in engines]
        place = self._placement
        shared = [place.trainer_ranks_of_engine(engine.index) for engine in engines] if self.colocated else []
        self.get(
            "connecting trainers and engines",
            [trainer.connect_engines.remote(self._router_url, urls, ranks, shared) for trainer in self.trainers],
        )

    def get(
        self,
        phase: str,
        refs: Sequence[Any],
        *,
        meanwhile: Callable[[], object] | None = None,
        every: float = POLL_S,
    ) -> list[Any]:
        """Return the results of `refs` in order; `meanwhile` is called every `every` seconds (see `Waiter.get`).

        Raises:
            RunError: naming the phase, and the process that failed, died or did not answer.
        """
        return self._waiter.get(phase, refs, meanwhile=meanwhile, every=every)

    def started(self) -> None:
        """Switch to the time limit of the loop's phases; until now the limit was that of an engine's start."""
        self._waiter.set_limit(self._args.phase_timeout, because="--phase-timeout")

    def watch(self, phase: str, ref: Any) -> None:
        """Watch `ref`, which is made in the background: from now on its failure ends whatever the loop waits for."""
        self._waiter.watch(phase, ref)

    def stop(self, *, well: bool = False) -> None:
        """End everything that `start` started. `well` means that nothing has failed, so Ray's logs are not kept."""
        if self._watchdog is not None:
            self._watchdog.expect("ending the run", END_TIMEOUT_S)
        if ray.is_initialized():
            self._stop_children()
            for actor in (*self.trainers, *self.engines, self.manager):
                if actor is not None:
                    ray.kill(actor)
            if self._placement is not None:
                self._placement.release()
            actors = _children(self._rays_own)
            if self._watchdog is not None:
                self._watchdog.stop_asking()
            ray.shutdown()
            _end(actors)
        if self._watchdog is not None:
            self._watchdog.close()
        if self._reaper is not None:
            if well:
                self._reaper.tell("well")
            self._reaper.finish()
        if self._weights is not None:
            self._weights.close()
        self._files.close()

    def _end_at_once(self, trouble: str) -> None:
        """End the run and this process from the watchdog's thread, because the main thread's calls of Ray hang.

        The reaper ends what the run has started, also processes that are stopped. A Ray that the run joined is left
        alone; it ends the run's actors when it continues.
        """
        message = (
            f"{trouble}{stopped_below(psutil.Process())}: the run has ended; started again, it goes on from its last "
            f"checkpoint\nlogs: {self._log_dir}"
        )
        logger.error("%s", message)
        print(f"\n{message}", file=sys.stderr, flush=True)
        if self._reaper is not None:
            self._reaper.tell("all")
            self._reaper.finish()
        os._exit(1)

    def _stop_children(self) -> None:
        """Ask the owners of engine and router processes to end them; their guards do it if an owner cannot."""
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
