"""Start engines and the router with the run's flags.

- Called by: the owner of each engine (`cluster.workers`) holds an `OwnEngine`; the rollout manager launches the router.
  `membership` then registers the engines at the router.
- Invariant: a secret is never on a command line (`command_line`), and a process never outlives its owner
  (`server_process`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slime.config.args import Args
from slime.engine.command_line import ServerCommand, flag_words, take_hidden
from slime.engine.kinds.kind import EngineStart, kind_of
from slime.engine.server_process import ManagedProcess, find_free_port, start_at_free_port

ROUTER_DEFAULTS: Mapping[str, Any] = {
    "policy": "round_robin",
    "health_check_interval_secs": 2,
    "health_check_timeout_secs": 10,
    "health_failure_threshold": 3,
    "health_success_threshold": 1,
    "worker_startup_check_interval": 1,
    # The circuit breaker counts refused requests (4xx) as failures, and would answer 503 for a healthy engine.
    "disable_circuit_breaker": True,
    "log_level": "warn",
}
"""Settings that differ from the router's own, with which it notices a dead engine only after three minutes."""
ROUTER_REQUEST_TIMEOUT_S = 365 * 24 * 3600
"""Out of reach, because the router's limit is for a whole response; the client limits the time without progress."""
ROUTER_OWN = ("host", "port", "prometheus_host", "prometheus_port")


class OwnEngine:
    """One engine of the run, of whatever kind, from its first start over its restarts to its end.

    Threads may ask for `phase` and `alive`, and call `stop`, while another one starts it.
    """

    def __init__(self, args: Args, *, index: int, log_path: Path, gpu_ids: Sequence[str]) -> None:
        """`index` is the engine's number; `gpu_ids` are its GPUs by rank, none if it computes on the CPU."""
        self._args = args
        self._index = index
        self._log_path = log_path
        self._gpu_ids = gpu_ids
        self._process: ManagedProcess | None = None
        self._phase: str | None = None

    def start(self, host: str) -> str:
        """Start it at a free port of the address `host`, and return its URL once it is ready and warmed up.

        Raises:
            RuntimeError: it ended, was not ready within --engine-start-timeout, or failed at its first request.
        """
        args, kind = self._args, kind_of(self._args)
        deadline = time.monotonic() + args.engine_start_timeout
        self._phase = None

        def launch(port: int) -> ManagedProcess:
            return launch_engine(
                args, index=self._index, host=host, port=port, log_path=self._log_path, gpu_ids=self._gpu_ids
            )

        def keep(process: ManagedProcess) -> None:
            self._process = process

        process = start_at_free_port(
            launch, port=lambda: kind.port(host, self._index), timeout=args.engine_start_timeout, keep=keep
        )
        if kind.warm_up is not None:
            self._phase = "warming up"
            kind.warm_up(args, process, max(1.0, deadline - time.monotonic()))
        self._phase = "ready"
        return process.url

    def phase(self) -> str:
        """Return the phase of its start that it is in."""
        return self._phase or ("starting" if self._process is None else self._process.phase())

    def alive(self) -> bool:
        """Return whether its process runs."""
        return self._process is not None and self._process.alive()

    def stop(self) -> None:
        """End its process, if it has been started."""
        if self._process is not None:
            self._process.stop()


def launch_engine(
    args: Args, *, index: int, host: str, port: int, log_path: str | Path, gpu_ids: Sequence[str] = ()
) -> ManagedProcess:
    """Start engine number `index`, for SGLang on `gpu_ids`. This returns at once; `wait_ready` waits.

    Raises:
        ValueError: --hf-checkpoint is not given, or the kind of engine cannot take one of the flags.
    """
    if args.hf_checkpoint is None:
        raise ValueError("--hf-checkpoint is not given; the engine loads its weights from it: name an HF directory")
    kind = kind_of(args)
    directory = tempfile.TemporaryDirectory(prefix="slime-engine-") if kind.needs_directory else None
    start = EngineStart(
        model_path=args.hf_checkpoint,
        index=index,
        host=host,
        port=port,
        gpu_ids=gpu_ids,
        directory=None if directory is None else Path(directory.name),
    )
    server = kind.command(args, start)
    if kind.logs_secrets:
        _make_private(Path(log_path))
    return ManagedProcess(
        f"engine {index}",
        server.argv(),
        url=f"http://{host}:{port}",
        log_path=log_path,
        environment={**server.full_environment(), "OMP_NUM_THREADS": str(args.cpu_threads_per_process or 1)},
        phases=kind.phases,
        directory=directory,
    )


def _make_private(path: Path) -> None:
    """Make a file that no other user can read, whether it exists or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)


def launch_router(args: Args, *, host: str, port: int, log_path: str | Path) -> ManagedProcess:
    """Start sglang-router with the --router-* flags. This returns at once; `wait_ready` waits."""
    given = {name: value for name, value in args.router.items() if name not in ROUTER_OWN}
    settings: dict[str, Any] = {
        **ROUTER_DEFAULTS,
        "request_timeout_secs": ROUTER_REQUEST_TIMEOUT_S,
        **given,
        "host": host,
        "port": port,
        "prometheus_host": host,  # its own default is every interface
        "prometheus_port": find_free_port(host),
    }
    hidden = take_hidden(settings, "router")
    server = ServerCommand("sglang_router.launch_router", flag_words(settings), hidden)
    return ManagedProcess(
        "router",
        server.argv(),
        url=f"http://{host}:{port}",
        log_path=log_path,
        environment=server.full_environment(),
    )


def start_router(args: Args, log_path: Path, *, keep: Callable[[ManagedProcess], None]) -> ManagedProcess:
    """Start the run's own router at a free port of this machine, and return it once it is ready.

    `keep` is given each process as soon as it is started, so that its owner can stop it.

    Raises:
        RuntimeError: it ended, or was not ready within --engine-start-timeout.
    """

    def launch(port: int) -> ManagedProcess:
        return launch_router(args, host="127.0.0.1", port=port, log_path=log_path)

    return start_at_free_port(launch, port=find_free_port, timeout=args.engine_start_timeout, keep=keep)
