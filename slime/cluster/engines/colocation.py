"""Colocation: engines and trainers take turns holding the memory of shared devices, unless each side has its own.

- Called by: `Cluster` holds one of the two classes, chosen by --colocate and --offload, and calls it around training
  and around a weight sync.
- Invariant: with shared devices, both sides hold memory at the same time only while weights are sent.

One step of the loop with shared devices; time goes down, and each line waits until the line above it has ended:

    verb               trainers hold                 engines hold                  who waits, and what unblocks it
    generate           nothing                       weights + KV cache            trainers: the loop calls them next
    to_trainers        nothing                       nothing                       engines: idle, then give back all
                       weights + optimizer (wake)    nothing                       loop: all trainers have reloaded
    train              weights + optimizer           nothing                       engines: sleep until `to_weights`
    to_weights         weights (optimizer is off)    nothing                       loop: all trainers have answered
                       weights                       weights (values undefined)    loop: all engines have answered
    send weights       weights                       weights (new version)         loop: all engines report the version
    to_engines         nothing (all is off)          weights                       loop: all trainers have answered
                       nothing                       weights + KV cache            requests may start

The peak is in `send weights`: two copies of the weights, but neither the optimizer's state nor a KV cache next to them.
"""

from __future__ import annotations

from typing import ClassVar

from slime.cluster.actors import Processes
from slime.config.args import Args
from slime.core.load_result import LoadResult


class DedicatedDevices:
    """The schedule without turns: with separate devices, with --no-offload, or if only one side exists."""

    by_turns: ClassVar[bool] = False

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def load(self) -> tuple[LoadResult | None, list[str]]:
        """Wait for the trainers, and return what they loaded and warnings. Engines may start meanwhile."""
        return self._processes.load()

    def connect(self) -> None:
        """Connect the engines."""
        if self._processes.has_engines:
            self._processes.connect_engines()

    def to_trainers(self) -> None:
        """Give trainers all of their memory, for a step."""

    def to_weights(self) -> None:
        """Give both sides the memory of the weights."""

    def to_engines(self) -> None:
        """Give engines all of their memory, to generate."""


class Colocated(DedicatedDevices):
    """The schedule of shared devices: trainers and engines take turns holding the memory.

    Engines start first, because they measure how much memory is free. They then sleep while the trainers load.
    """

    by_turns = True

    def load(self) -> tuple[LoadResult | None, list[str]]:
        self._processes.connect_engines()
        self._put_engines_to_sleep()
        return self._processes.load()

    def connect(self) -> None:
        """Do nothing: `load` has connected the engines already."""

    def to_trainers(self) -> None:
        self._put_engines_to_sleep()
        trainers = self._processes.trainers
        self._processes.waiter.get("trainers take memory", [trainer.wake.remote() for trainer in trainers])

    def to_weights(self) -> None:
        self._put_trainers_to_sleep(keep_weights=True)
        self._wake_engines(to_generate=False)

    def to_engines(self) -> None:
        self._put_trainers_to_sleep(keep_weights=False)
        self._wake_engines(to_generate=True)

    def _put_trainers_to_sleep(self, *, keep_weights: bool) -> None:
        trainers = self._processes.trainers
        sleeping = [trainer.sleep.remote(keep_weights=keep_weights) for trainer in trainers]
        self._processes.waiter.get("trainers give back memory", sleeping)

    def _put_engines_to_sleep(self) -> None:
        self._processes.waiter.get("engines give back memory", [self._processes.manager.put_engines_to_sleep.remote()])

    def _wake_engines(self, *, to_generate: bool) -> None:
        waking = [self._processes.manager.wake_engines.remote(to_generate=to_generate)]
        self._processes.waiter.get("engines take memory", waking)


def make_memory_schedule(args: Args, processes: Processes) -> DedicatedDevices:
    """Return `Colocated` if trainers and engines both exist and share devices, otherwise `DedicatedDevices`."""
    shared = args.colocate and bool(args.offload) and processes.has_engines and bool(processes.trainers)
    return (Colocated if shared else DedicatedDevices)(processes)
