"""Host memory for what stands on the device by turns: pinned where there is one, taken once and used again.

Path: `snapshots` keeps weights of other models in it, `offload` what a sleeping trainer holds. Invariant: what is
restored is what was stored, byte for byte; when `store` or `restore` returns, every copy is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slime.megatron import device

CHUNK = 1024**3
"""Bytes. PyTorch rounds pinned memory up to a power of two: chunks of one waste nothing, but in the last."""


def as_bytes(tensor: Tensor) -> Tensor:
    """The contiguous tensor's own memory, flat."""
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8)


class HostMemory:
    """Holds a copy of one sequence of flat byte tensors at a time."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def store(self, tensors: Sequence[Tensor]) -> int:
        """Copy `tensors` here -> bytes."""
        total = sum(map(len, tensors))
        self._reserve(total)
        for here, there in self._pieces(tensors):
            here.copy_(there, non_blocking=True)
        device.synchronize()
        return total

    def restore(self, tensors: Sequence[Tensor]) -> int:
        """Copy back into `tensors`, of the lengths that were stored -> bytes."""
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
            with device.layer():  # where nothing can be pinned it is ordinary memory
                self._chunks.append(torch.empty(length, dtype=torch.uint8, pin_memory=True))
            have += length

    def _pieces(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(a part of a chunk, the part of a tensor that stands there)."""
        position = 0
        for tensor in tensors:
            done = 0
            while done < len(tensor):
                number, begin = divmod(position, CHUNK)
                length = min(len(tensor) - done, CHUNK - begin)
                yield self._chunks[number][begin : begin + length], tensor[done : done + length]
                done, position = done + length, position + length
