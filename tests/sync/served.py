"""Engines and a router that run on their own, as a user would have started them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from slime.config.args import Args
from slime.engine.launch import ManagedProcess, find_free_port, launch_engine, launch_router


@contextmanager
def serving(model: Path, logs: Path, *, engines: int, router: bool = True) -> Generator[list[ManagedProcess]]:
    """Engines that serve `model`, and behind them, last in the list, a router that knows none of them."""
    args = Args(hf_checkpoint=str(model))
    started: list[ManagedProcess] = []
    try:
        for index in range(engines):
            log = logs / f"engine-{index}.log"
            started.append(launch_engine(args, index=index, host="127.0.0.1", port=find_free_port(), log_path=log))
        if router:
            log = logs / "router.log"
            started.append(launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=log))
        for process in started:
            process.wait_ready(60)
        yield started
    finally:
        for process in started:
            process.stop()
