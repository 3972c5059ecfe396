"""EngineWeightSync: the driver's side of engines that die and restart; it connects trainers to the present engines.

- Where it sits: `Cluster` sends weights through here, and lets it look after the engines while it waits for the rollout
  manager. `engine_supervisor` does the watching and restarting.
- Invariant: a restarted engine generates only after it has received whole weights, the ones that the run last sent or
  newer. The other engines are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray

from slime.cluster.actors import Processes
from slime.cluster.engines.colocation import DedicatedDevices
from slime.cluster.engines.engine_supervisor import EnginesState, EngineUp
from slime.core.errors import Fault, RunError

logger = logging.getLogger(__name__)


class EngineWeightSync:
    """Sends weights to the engines that are up, and to those that are restarted. `say` shows a line to the user."""

    def __init__(self, processes: Processes, memory: DedicatedDevices, say: Callable[[str], None]) -> None:
        self._processes = processes
        self._waiter = processes.waiter
        self._memory = memory
        self._say = say
        self._connected: tuple[EngineUp, ...] = ()
        self._asked: Any = None
        self._progress = 0
        self._trainers_hold = 0
        self._engines_hold = 0

    def trained(self) -> None:
        """Record that the trainers' weights are newer than the engines'."""
        self._trainers_hold = self._engines_hold + 1

    def send(self, version: int) -> dict[str, float]:
        """Send the actor's weights to every engine that is up, as `version`; if one dies meanwhile, send again.

        Raises:
            RunError: the weights did not arrive, and no engine was lost.
        """
        while True:
            up = self._wait_for_engines().up
            self._processes.manager.weights_change.remote()
            try:
                report = self._send_to(up, version)
                self._admit(up, version)
            except RunError as error:
                self._raise_unless_lost(error, up)
                self._say(f"FAULT weight sync, policy version {version}: an engine was lost on the way; sending again")
                logger.warning("sending again", exc_info=error)
                continue
            self._trainers_hold = self._engines_hold = version
            return report

    def look_after(self) -> int:
        """Report what has happened, and send weights to restarted engines; for times when trainers are idle.

        Returns:
            A number that grows while engines generate.
        """
        state = self._state_if_there() if self._processes.has_engines else None
        if state is None:
            return self._progress
        self._progress = state.progress
        if state.waiting and self._processes.trainers:
            self._supply(state)
        return self._progress

    def _supply(self, state: EnginesState) -> None:
        serving = len(state.waiting) < len(state.up)
        if self._memory.by_turns or self._engines_hold != self._trainers_hold:
            if serving:
                return  # restarted engines wait for the next weight sync
            self._memory.to_trainers()
            self._memory.to_weights()
        try:
            # The other engines continue to generate with their weights, which are the same.
            self._send_to(state.waiting, self._trainers_hold)
            if self._memory.by_turns:
                self._memory.to_engines()
            self._admit(state.waiting, self._trainers_hold)
        except RunError as error:
            self._raise_unless_lost(error, state.waiting)
            logger.warning("an engine was lost again", exc_info=error)
            return
        self._engines_hold = self._trainers_hold

    def _send_to(self, engines: Sequence[EngineUp], version: int) -> dict[str, float]:
        processes = self._processes
        if tuple(engines) != self._connected:
            self._connected = ()
            processes.connect_trainers(engines)
            self._connected = tuple(engines)
        phase = f"weight sync, policy version {version}"
        return self._waiter.get(phase, [trainer.send_weights.remote(version) for trainer in processes.trainers])[0]

    def _admit(self, engines: Sequence[EngineUp], version: int) -> None:
        """Record that the engines hold `version` now, and let them generate."""
        admitting = self._processes.manager.set_policy_version.remote(version, list(engines))
        self._waiter.get(f"weight sync, policy version {version}: admitting the engines", [admitting])

    def _wait_for_engines(self) -> EnginesState:
        """Wait until there is at least one engine."""
        [state] = self._waiter.get("waiting for an engine", [self._processes.manager.state_with_engines.remote()])
        return self._reported(state)

    def _raise_unless_lost(self, error: RunError, engines: Sequence[EngineUp]) -> None:
        """Return if a sync failed because one of its engines is gone, so that it can be tried again.

        Raises:
            RunError: `error`, if all engines are still there.
            Fault: with --colocate, where a failed sync leaves trainers waiting for each other.
        """
        asking = self._processes.manager.lost_one_of.remote(list(engines))
        [lost] = self._waiter.get("weight sync: looking for an engine that was lost", [asking])
        if not lost:
            raise error
        if self._processes.colocated:
            raise Fault(str(error)) from error

    def _state_if_there(self) -> EnginesState | None:
        """Return the manager's report if it has arrived, otherwise None."""
        if self._asked is None:
            self._asked = self._processes.manager.engines_state.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        [state] = self._waiter.get("asking for the engines", [self._asked])
        self._asked = None
        return self._reported(state)

    def _reported(self, state: EnginesState) -> EnginesState:
        for line in state.news:
            self._say(line)
        return state
