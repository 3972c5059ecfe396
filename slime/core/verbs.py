"""Verbs: what a training loop is written in, and what runs it: a cluster of processes, or a simulation.

- Used by: the loops in `slime.cli`; `cluster.Cluster` and `simulate.loop.SimulatedCluster` have these verbs.
- Invariant: a loop calls nothing else, so the simulated schedule is the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Verbs(Protocol):
    """The verbs of the training loop; `cluster.Cluster` describes each."""

    def rollouts(self) -> Iterator[int]: ...

    def generate(self, rollout_id: int) -> Any: ...

    def generate_ahead(self, rollout_id: int) -> Any: ...

    def engines_asleep(self) -> AbstractContextManager[None]: ...

    def train(self, rollout_id: int, parts: Any) -> None: ...

    def save_if_due(self, rollout_id: int) -> None: ...

    def sync_weights(self) -> None: ...

    def evaluate_before_first(self) -> None: ...

    def evaluate_if_due(self, rollout_id: int) -> None: ...


Story = Callable[[Verbs], None]
"""A training loop, written in verbs."""
