"""The processes of a run: started in order, waited for by name, and all ended when the run ends.

- Used by: `Cluster` holds one `Processes` and calls its actors.
- Invariant: after the block of `running_processes`, no process that it started is alive, however far the start came and
  however the run ended. No other process is touched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from slime.cluster.engines.engine_supervisor import EngineUp
from slime.cluster.on_ray.placement import (
    Placement,
    choose_engine,
    groups_across_nodes,
    num_gpus,
    num_nodes,
    object_store_bytes,
    reserve,
)
from slime.cluster.on_ray.ray_session import ray_session
from slime.cluster.on_ray.ray_wait import Waiter
from slime.cluster.rollout_manager import RolloutManager
from slime.cluster.workers import EngineWorker, TrainWorker
from slime.config.args import Args
from slime.config.epochs import rollouts_of_epochs
from slime.config.object_store import shortage
from slime.config.parse import schedule_problems
from slime.config.rollout_plan import data_parallel_rank
from slime.core.errors import RunError
from slime.engine.external import FoundEngines, find_engines
from slime.engine.keys import Keys, with_keys
from slime.engine.kinds.kind import check_here, kind_of
from slime.engine.membership import Membership, external_router_url
from slime.observability.console.run_console import RunConsole
from slime.sync.weight_directory import WeightDirectory

if TYPE_CHECKING:
    from slime.core.load_result import LoadResult

STOP_TIMEOUT_S = 15.0
SILENT_S = 30.0
"""Seconds for which Ray's own processes may always be silent: a loaded machine is not a dead one."""
PROGRESS_S = 5.0
OPEN_ROUTER = (
    "the router at {url} requires no key for its list of engines: whoever reaches it can add one, which ends the run "
    "only after it was sent prompts; start it with --control-plane-api-keys ID:NAME:admin:KEY, and give the run "
    "--router-control-plane-api-keys with the same"
)
logger = logging.getLogger(__name__)


@contextmanager
def running_processes(args: Args, log_dir: Path, console: RunConsole) -> Iterator[Processes]:
    """Start Ray and all actors for the block; when the block begins, they may still be importing.

    `console` shows the stages of the start.

    If the block ends without an error, nothing has failed, so Ray's logs are not kept.

    Raises:
        RunError: naming what does not start, or what the run shares with others and cannot use.
    """
    args, log_dir = with_keys(args), log_dir.absolute()
    with ExitStack() as cleanup:
        external = _take_what_is_shared(args, cleanup, console.say)
        silence = max(SILENT_S, args.engine_health_timeout)
        with console.stage("Ray"):
            session = cleanup.enter_context(ray_session(args, log_dir, silence=silence))
            args = choose_engine(args, num_gpus())
            place = reserve(args)
            cleanup.callback(place.release)
            for warning in groups_across_nodes(args, place.layout.trainers):
                console.say(warning)
            small = shortage(args, object_store_bytes())
            if small is not None:
                console.say(f"WARNING {small}")
        limits = (args.phase_timeout, "--phase-timeout"), (args.engine_start_timeout, "--engine-start-timeout")
        limit, because = max(limits)
        started = _Started(Waiter(where=str(log_dir), limit=limit, because=because))
        cleanup.callback(started.stop)
        cleanup.callback(session.expect_end)
        directory = session.directory
        yield Processes(
            args, log_dir, place=place, directory=directory, external=external, started=started, console=console
        )


def _take_what_is_shared(args: Args, cleanup: ExitStack, say: Callable[[str], None]) -> FoundEngines:
    """Check external engines and router, and lock the weight directory, before the run starts any process.

    Raises:
        RunError: one of them does not answer, serves another model, or belongs to another run.
    """
    router_url = external_router_url(args)
    try:
        check_here(args)  # where the engine is not installed on the driver, the nodes check theirs
        found = asyncio.run(find_engines(args, say=say))
        if router_url is not None and args.num_engines:
            router = Membership(router_url, keys=Keys.of(args), timeout=args.engine_start_timeout)
            router.wait_ready()
            if router.is_open():
                say(f"WARNING {OPEN_ROUTER.format(url=router_url)}")
            router.refuse_others(args.rollout_external_engines)
        if args.writes_weight_files:
            cleanup.callback(WeightDirectory(Path(args.resolved.update_weight_disk_dir)).close)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(str(error)) from error
    return found


class _Started:
    """The actors that have been started so far, with their names for errors."""

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self._actors: list[Any] = []
        self._closing: list[Callable[[], Any]] = []

    def add(self, actor: Any, name: str, *, close: Callable[[], Any] | None = None) -> Any:
        """Add an actor and return it. `close` calls its method that ends its child processes."""
        self._actors.append(actor)
        self.waiter.name(actor, name)
        if close is not None:
            self._closing.append(close)
        return actor

    def stop(self) -> None:
        """Ask the owners of engine and router processes to end them, then kill all actors.

        The guards of those processes end them if an owner cannot.
        """
        closing = [close() for close in reversed(self._closing)]
        done, late = ray.wait(closing, num_returns=len(closing), timeout=STOP_TIMEOUT_S) if closing else ([], [])
        for ref in done:
            try:
                ray.get(ref)
            except RayError as error:
                logger.warning("stopping: %s", error)
        if late:
            logger.warning("stopping: %d processes did not answer within %.0f s", len(late), STOP_TIMEOUT_S)
        for actor in reversed(self._actors):
            ray.kill(actor)


class Processes:
    """Ray actors by role: `trainers[rank]`, `engines[index]`, `manager`; `waiter` waits for their results."""

    def __init__(
        self,
        args: Args,
        log_dir: Path,
        *,
        place: Placement,
        directory: Path,
        external: FoundEngines,
        started: _Started,
        console: RunConsole,
    ) -> None:
        """Start all actors in their places; `directory` is the run's temporary one, where trainers may meet."""
        self._args = args
        self._place = place
        self._external = external
        self.waiter = started.waiter
        self._console = console
        self._router_url = ""
        near, logs = num_nodes() == 1, str(log_dir)
        manager = ray.remote(RolloutManager).options(**place.manager()).remote(args, logs, alone=True)
        self.manager: Any = started.add(manager, "the rollout manager", close=manager.close.remote)
        self._prompts_loaded = self.manager.start.remote()
        self.engines: list[Any] = []
        for index in range(place.num_engines):
            # Ray restarts an owner whose process dies, in the same place; the new owner then restarts the engine.
            options = EngineWorker.options(max_concurrency=4, max_restarts=-1, **place.engine(index))
            engine = options.remote(args, index, logs, place.engine_gpu_ids(index), near=near)
            self.engines.append(started.add(engine, f"the owner of engine {index}", close=engine.stop.remote))
        kind = kind_of(args)
        if kind.check is not None:
            checking = [engine.check.remote() for engine in self.engines]
            self.waiter.get(f"checking {args.engine.label}", checking)
        self._engine_urls = [engine.start.remote() for engine in self.engines]
        if args.colocate and not args.offload and kind.takes_free_memory:
            with console.stage("engines"):
                self._wait_for_engines()  # trainers would take a part of the memory that it sizes itself by
        self.num_rollouts = self._count_rollouts()
        args = replace(args, num_rollout=self.num_rollouts)  # a learning rate schedule needs to know its length
        rendezvous = place.rendezvous(str(directory))
        self.trainers: list[Any] = []
        for rank in range(place.num_trainers):
            trainer = TrainWorker.options(**place.trainer(rank)).remote(args, rank, rendezvous, logs)
            name = f"trainer {rank} (its log is {log_dir / f'trainer-{rank}.log'})"
            self.trainers.append(started.add(trainer, name))

    def _wait_for_engines(self) -> list[str]:
        """Return the engines' URLs once all are ready; while waiting, show their phases every PROGRESS_S seconds."""

        def show_phases() -> None:
            phases = self.waiter.get("asking the engines", [engine.phase.remote() for engine in self.engines])
            self._console.note(", ".join(f"engine {index} {phase}" for index, phase in enumerate(phases)))

        return self.waiter.get("starting the engines", self._engine_urls, meanwhile=show_phases, every=PROGRESS_S)

    def _count_rollouts(self) -> int:
        """Return --num-rollout, or the number of rollouts in --num-epoch with the prompts that were kept.

        Raises:
            RunError: the learning rate's schedule does not fit into that number.
        """
        args = self._args
        if args.num_rollout is not None:
            return args.num_rollout
        with self._console.stage("prompts"):
            self.waiter.get("loading the prompts", [self._prompts_loaded])
        [num_prompts] = self.waiter.get("counting the prompts", [self.manager.num_prompts.remote()])
        num_rollouts = rollouts_of_epochs(args, num_prompts)
        for problem in schedule_problems(replace(args, num_rollout=num_rollouts)):
            raise RunError(str(problem))
        return num_rollouts

    def load(self) -> tuple[LoadResult | None, list[str]]:
        """Wait for trainers and prompts; return what was loaded (None without trainers), and warnings."""
        with self._console.stage("trainers: loading weights" if self.trainers else "prompts"):
            loaded = self.waiter.get("loading the model", [trainer.load.remote() for trainer in self.trainers])
            [warnings] = self.waiter.get("loading the prompts", [self._prompts_loaded])
        warnings = [*warnings, *self._external.warnings]
        if not loaded:
            return None, warnings
        result, of_rank_zero = loaded[0]
        return result, of_rank_zero + warnings

    def generate(self, rollout_id: int) -> tuple[list[Any], Any]:
        """Begin a rollout; return references to the parts of the ranks (none without trainers) and to its metrics."""
        if not self.trainers:
            _, report = self.manager.generate.options(num_returns=2).remote(rollout_id)
            return [], report
        call = self.manager.generate_parts.options(num_returns=self._args.data_parallel_size + 1)
        *parts, report = call.remote(rollout_id)
        return parts, report

    def validation_sets(self) -> tuple[list[Any], Any]:
        """Begin to load SFT's evaluation sets; return references to the parts of the ranks, and to the sets' names."""
        call = self.manager.validation_parts.options(num_returns=self._args.data_parallel_size + 1)
        *parts, names = call.remote()
        return parts, names

    def of_trainers(self, parts: Sequence[Any]) -> list[Any]:
        """Return the part of each trainer, which is that of its data-parallel rank."""
        return [parts[data_parallel_rank(self._args, rank)] for rank in range(len(self.trainers))]

    @property
    def colocated(self) -> bool:
        """Whether engines use the trainers' devices."""
        return bool(self._args.colocate)

    @property
    def has_engines(self) -> bool:
        """Whether there is any engine to generate with."""
        return self._args.num_engines > 0

    def connect_engines(self) -> None:
        """Wait for the engines, and register them with the router."""
        with self._console.stage("engines"):
            [self._router_url] = self.waiter.get("starting the router", [self.manager.start_router.remote()])
            urls = [*self._external.urls, *self._wait_for_engines()]
            refs = [self.manager.connect_engines.remote(self._router_url, urls, self.engines)]
            self.waiter.get("registering the engines", refs)

    def connect_trainers(self, engines: Sequence[EngineUp]) -> None:
        """Connect trainers and these engines for weight syncs; other engines get no weights from then on."""
        place = self._place
        all_ranks = [*self._external.num_ranks, *[place.want.gpus_per_engine or 1] * place.num_engines]
        urls = [engine.url for engine in engines]
        ranks = [all_ranks[engine.index] for engine in engines]
        shared = [place.trainer_ranks_of_engine(engine.index) for engine in engines] if self.colocated else []
        self.waiter.get(
            "connecting trainers and engines",
            [trainer.connect_engines.remote(self._router_url, urls, ranks, shared) for trainer in self.trainers],
        )

    def started(self) -> None:
        """Switch to the time limit of the loop's phases; until now the limit was that of an engine's start."""
        self.waiter.set_limit(self._args.phase_timeout, because="--phase-timeout")
