"""Snapshots: copies of the weights in host memory, swapped into the one model that is built.

- Used by: `trainer` takes one of the reference model when it loads, and computes reference log-probs inside `holding`.
- Invariant: outside of `holding` the model holds the actor's weights, bit for bit, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from slime.megatron.model.build import ModelChunks, all_weights
from slime.megatron.offload.host_memory import HostMemory, as_bytes


class Snapshots:
    """Named copies of a model's weights."""

    def __init__(self, model: ModelChunks) -> None:
        self._model = model
        self._copies: dict[str, HostMemory] = {}
        self._actor = HostMemory()

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def take(self, name: str) -> None:
        """Keep a copy of the weights that the model holds now."""
        self._copies.setdefault(name, HostMemory()).store(self._weights())

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Inside, the model holds the snapshot `name`; afterwards it holds its earlier weights again."""
        self._actor.store(self._weights())
        try:
            self._copies[name].restore(self._weights())
            yield
        finally:
            self._actor.restore(self._weights())

    def _weights(self) -> list[Tensor]:
        return [as_bytes(weight) for weight in all_weights(self._model)]
