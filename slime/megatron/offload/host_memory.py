"""Host memory for tensors that are on the device only part of the time; pinned on CUDA, allocated once and reused.

- Used by: `snapshots` keeps the weights of other models in it, `offload` keeps what a sleeping trainer holds.
- Invariant: what is restored is what was stored, byte for byte; when `store` or `restore` returns, every copy is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slime.megatron import device
from slime.megatron.compat import cpu_layer

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
            with cpu_layer.layer():  # on a CPU nothing can be pinned, and this is ordinary memory
                self._chunks.append(torch.empty(length, dtype=torch.uint8, pin_memory=True))
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
