"""Snapshots: copies of the weights in host memory, swapped into the one model that is built.

Path: the trainer takes one of the reference model at load; log-probs of the reference are computed inside `holding`.
Invariant: outside of `holding` the model holds the actor's weights, bit for bit, also after an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Snapshots:
    """Named copies of a model's parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._copies: dict[str, list[Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._copies

    def take(self, name: str) -> None:
        """Keep the weights that the model holds now."""
        self._copies[name] = self._copy()

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Inside, the model holds the snapshot `name`; afterwards what it held before."""
        actor = self._copy()
        self._fill(self._copies[name])
        try:
            yield
        finally:
            self._fill(actor)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._model.parameters()]

    def _fill(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, values in zip(self._model.parameters(), weights, strict=True):
                parameter.copy_(values)
