"""Noticing that an engine or the router has died.

Path: the rollout manager runs `first_death` beside every rollout and evaluation. Invariant: a dead process is named,
with its log, within a few seconds; nothing waits for it for ever.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from slime.engine.launch import ManagedProcess

POLL_S = 1.0


class EngineWatch:
    """Polls the owners of the engine processes, and the router's process."""

    def __init__(self, engines: list[Any], urls: list[str], log_dir: Path, router: ManagedProcess | None) -> None:
        self._engines = engines
        self._urls = urls
        self._log_dir = log_dir
        self._router = router

    async def first_death(self) -> str:
        """Returns only once something has died: a sentence that names it and its log."""
        while True:
            await asyncio.sleep(POLL_S)
            if self._router is not None and not self._router.alive():
                return f"the router died during generation; its log is {self._log_dir / 'router.log'}"
            for index, (engine, url) in enumerate(zip(self._engines, self._urls, strict=True)):
                try:
                    alive = await engine.alive.remote()
                except RayActorError:
                    alive = False
                if not alive:
                    log = self._log_dir / f"engine-{index}.log"
                    return f"engine {index} ({url}) died during generation; its log is {log}"
