"""Engines and a router that run by themselves, as if a user had started them."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from slime.config.args import Args
from slime.engine.launch import launch_engine, launch_router
from slime.engine.server_process import ManagedProcess, find_free_port


@contextmanager
def serving(
    model: Path, logs: Path, *, engines: int, older: int = 0, router: bool = True, **settings: object
) -> Generator[list[ManagedProcess]]:
    """Start engines that serve `model`, then `older` ones without weight-update sessions, and last a router.

    The router knows none of the engines, and is started with `settings`.
    """
    args = Args(hf_checkpoint=str(model), router=settings)
    started: list[ManagedProcess] = []
    try:
        for index in range(engines):
            log = logs / f"engine-{index}.log"
            started.append(launch_engine(args, index=index, host="127.0.0.1", port=find_free_port(), log_path=log))
        started += [_older_engine(model, logs / f"older-{index}.log") for index in range(older)]
        if router:
            log = logs / "router.log"
            started.append(launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=log))
        for process in started:
            process.wait_ready(60)
        yield started
    finally:
        for process in started:
            process.stop()


def _older_engine(model: Path, log: Path) -> ManagedProcess:
    port = find_free_port()
    command = [sys.executable, "-m", "slime.engine.embedded.server", "--model-path", str(model), "--port", str(port)]
    return ManagedProcess(
        "older engine",
        [*command, "--no-update-sessions"],
        url=f"http://127.0.0.1:{port}",
        log_path=log,
        environment={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
