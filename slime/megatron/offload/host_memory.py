"""Host memory for tensors that are on the device only part of the time; pinned on CUDA, allocated once and reused.

- Used by: `trainer` takes a snapshot of the reference model when it loads, and computes reference log-probs inside
  `Snapshots.holding`; `trainer_memory` keeps what a sleeping trainer holds.
- Invariant: restored bytes equal the stored ones; when `store` or `restore` returns, every copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slime.megatron import device

CHUNK = 1024**3
"""Bytes. PyTorch rounds pinned memory up to a power of two, so only the last chunk can waste memory."""


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the contiguous tensor's own memory as flat bytes."""
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8)


class HostMemory:
    """A copy of one sequence of flat byte tensors at a time."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def store(self, tensors: Sequence[Tensor]) -> int:
        """Copy `tensors` into this memory, and return the number of bytes."""
        total = sum(map(len, tensors))
        self._reserve(total)
        for here, there in self._pieces(tensors):
            here.copy_(there, non_blocking=True)
        device.synchronize()
        return total

    def restore(self, tensors: Sequence[Tensor]) -> int:
        """Copy back into `tensors`, which have the stored lengths, and return the number of bytes."""
        for here, there in self._pieces(tensors):
            there.copy_(here, non_blocking=True)
        device.synchronize()
        return sum(map(len, tensors))

    def _reserve(self, size: int) -> None:
        have = sum(map(len, self._chunks))
        if have >= size:
            return
        if self._chunks and len(self._chunks[-1]) < CHUNK:
            have -= len(self._chunks.pop())
        while have < size:
            length = min(size - have, CHUNK)
            # on a CPU nothing can be pinned, and this is ordinary memory
            self._chunks.append(torch.empty(length, dtype=torch.uint8, pin_memory=device.on_cuda()))
            have += length

    def _pieces(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (a part of a chunk, the part of a tensor that is stored there)."""
        position = 0
        for tensor in tensors:
            done = 0
            while done < len(tensor):
                number, begin = divmod(position, CHUNK)
                length = min(len(tensor) - done, CHUNK - begin)
                yield self._chunks[number][begin : begin + length], tensor[done : done + length]
                done, position = done + length, position + length


class Snapshots:
    """Named copies of a model's weights in host memory, swapped into the one model that is built.

    Outside of `holding` the model holds the actor's weights, bit for bit, also after an error.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        """Take the function that yields the model's weights, always in the same order."""
        self._model_weights = weights
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
        return [as_bytes(weight) for weight in self._model_weights()]
