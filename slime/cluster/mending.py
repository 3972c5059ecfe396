"""The driver's side of engines that come and go: trainers are connected to those that are there, and supply new ones.

Path: `Cluster` sends weights through here, and lets it look after the engines while it waits for the rollout manager
(`fleet` does the watching). Invariant: an engine that was started anew generates only once it has been sent whole
weights, the ones that the run last sent or newer; the engines beside it are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray

from slime.cluster.fleet import EngineUp, FleetState
from slime.cluster.processes import Processes
from slime.cluster.turns import OwnMemory
from slime.core.errors import Fault, RunError

logger = logging.getLogger(__name__)


class Mending:
    """`say` shows a line to the user."""

    def __init__(self, processes: Processes, memory: OwnMemory, say: Callable[[str], None]) -> None:
        self._processes = processes
        self._memory = memory
        self._say = say
        self._connected: tuple[EngineUp, ...] = ()
        self._asked: Any = None
        self._progress = 0
        self._trainers_hold = 0
        self._engines_hold = 0

    def trained(self) -> None:
        """The trainers' weights are newer than the engines'."""
        self._trainers_hold = self._engines_hold + 1

    def send(self, version: int) -> dict[str, float]:
        """The actor's weights to every engine that is up, as `version`; where one is lost on the way, once more.

        Raises:
            RunError: they did not arrive, and no engine was lost.
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
        """Tell what has happened, and supply engines that were started anew; for times when trainers are idle.

        Returns:
            A number that grows with what the engines have generated.
        """
        state = self._state_if_there() if self._processes.has_engines else None
        if state is None:
            return self._progress
        self._progress = state.progress
        if state.waiting and self._processes.trainers:
            self._supply(state)
        return self._progress

    def _supply(self, state: FleetState) -> None:
        serving = len(state.waiting) < len(state.up)
        if self._memory.by_turns or self._engines_hold != self._trainers_hold:
            if serving:
                return  # they wait for the next weight sync
            self._memory.to_trainers()
            self._memory.to_weights()
        try:
            # The engines beside them go on generating with what they have, which is the same.
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
        return processes.get(phase, [trainer.send_weights.remote(version) for trainer in processes.trainers])[0]

    def _admit(self, engines: Sequence[EngineUp], version: int) -> None:
        """They hold `version` now, and may generate."""
        admitting = self._processes.manager.set_policy_version.remote(version, list(engines))
        self._processes.get(f"weight sync, policy version {version}: admitting the engines", [admitting])

    def _wait_for_engines(self) -> FleetState:
        """Until there is one at least."""
        [state] = self._processes.get("waiting for an engine", [self._processes.manager.fleet_with_engines.remote()])
        return self._told(state)

    def _raise_unless_lost(self, error: RunError, engines: Sequence[EngineUp]) -> None:
        """A sync that has failed is tried again where one of its engines is not there any more.

        Raises:
            RunError: `error`, where all are.
            Fault: with --colocate, where trainers are left waiting for each other.
        """
        asking = self._processes.manager.lost_one_of.remote(list(engines))
        [lost] = self._processes.get("weight sync: looking for an engine that was lost", [asking])
        if not lost:
            raise error
        if self._processes.colocated:
            raise Fault(str(error)) from error

    def _state_if_there(self) -> FleetState | None:
        """The manager's last answer. It may be busy, or gone: that is for whoever waits for its work to find."""
        if self._asked is None:
            self._asked = self._processes.manager.fleet_state.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        [state] = self._processes.get("asking for the engines", [self._asked])
        self._asked = None
        return self._told(state)

    def _told(self, state: FleetState) -> FleetState:
        for line in state.news:
            self._say(line)
        return state
