"""Who has the devices' memory when: engines and trainers with devices of their own, or by turns on the same.

Path: `Cluster` holds one of the two, by --colocate and --offload, and calls it around training and around a weight
sync. Invariant: by turns, the two sides hold memory together only while weights go from one to the other: engines give
up memory → train → engines take the weights' memory back → weights are sent → trainers drop theirs → engines take the
KV cache's memory back.
"""

from __future__ import annotations

from typing import ClassVar

from slime.cluster.processes import Processes
from slime.config.args import Args
from slime.megatron.result import LoadResult


class OwnMemory:
    """Nobody waits for anybody's memory: devices of their own, or --no-offload, or one side alone."""

    by_turns: ClassVar[bool] = False

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def load(self) -> tuple[LoadResult | None, list[str]]:
        """Wait for the trainers; returns what they loaded. Engines may start meanwhile."""
        return self._processes.load()

    def connect(self) -> None:
        """Engines are there."""
        if self._processes.has_engines:
            self._processes.connect_engines()

    def to_trainers(self) -> None:
        """Trainers have all of theirs, for a step."""

    def to_weights(self) -> None:
        """Both sides have that of the weights."""

    def to_engines(self) -> None:
        """Engines have all of theirs, to generate."""


class MemoryByTurns(OwnMemory):
    """Trainers and engines hold it by turns. Engines start first: they measure how much is free."""

    by_turns = True

    def load(self) -> tuple[LoadResult | None, list[str]]:
        self._processes.connect_engines()
        self._put_engines_to_sleep()
        return self._processes.load()

    def connect(self) -> None:
        """Engines are there already."""

    def to_trainers(self) -> None:
        self._put_engines_to_sleep()
        trainers = self._processes.trainers
        self._processes.get("trainers take memory", [trainer.wake.remote() for trainer in trainers])

    def to_weights(self) -> None:
        self._put_trainers_to_sleep(keep_weights=True)
        self._wake_engines(to_generate=False)

    def to_engines(self) -> None:
        self._put_trainers_to_sleep(keep_weights=False)
        self._wake_engines(to_generate=True)

    def _put_trainers_to_sleep(self, *, keep_weights: bool) -> None:
        trainers = self._processes.trainers
        sleeping = [trainer.sleep.remote(keep_weights=keep_weights) for trainer in trainers]
        self._processes.get("trainers give back memory", sleeping)

    def _put_engines_to_sleep(self) -> None:
        self._processes.get("engines give back memory", [self._processes.manager.put_engines_to_sleep.remote()])

    def _wake_engines(self, *, to_generate: bool) -> None:
        waking = [self._processes.manager.wake_engines.remote(to_generate=to_generate)]
        self._processes.get("engines take memory", waking)


def memory_of(args: Args, processes: Processes) -> OwnMemory:
    """Turns are taken where both sides are there, and share."""
    shared = args.colocate and bool(args.offload) and processes.has_engines and bool(processes.trainers)
    return (MemoryByTurns if shared else OwnMemory)(processes)
