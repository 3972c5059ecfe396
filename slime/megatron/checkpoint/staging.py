"""Copies of a checkpoint's tensors in host memory, from which it is written while training goes on.

- Used by: `snapshot` copies what this rank writes; the trainer keeps one `Staging` for all of its saves.
- Invariant: a copy shares no memory with its tensor, and has its bytes once the device has been waited for. The memory
  is allocated once, and used again by the next save, which waits until this one has been written.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor

from slime.megatron import device

logger = logging.getLogger(__name__)

ALIGNED = 64
"""Bytes. Every copy begins at a multiple of this."""
LEFT = 0.05
"""The share of the free host memory that is left for others."""


class Staging:
    """Host memory for one checkpoint at a time; page-locked on CUDA, so that the device copies into it directly."""

    def __init__(self, *, ranks_here: int = 1) -> None:
        """Take the number of ranks on this machine, which all need such memory."""
        self._ranks_here = ranks_here
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._unlock: Callable[[], object] = lambda: None

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self._buffer.is_pinned()

    @torch.no_grad()
    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Return a copy of each tensor, in its shape and dtype; None if there is not enough free memory for them.

        A GPU copies while the host goes on: wait with `device.synchronize` before a tensor may change.
        """
        places, size = list[int](), 0
        for tensor in tensors:
            places.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if size > len(self._buffer) and not self._allocate(size):
            return None
        whole, copies = self._buffer.numpy(), list[Tensor]()
        for place, tensor in zip(places, tensors, strict=True):
            # by way of numpy: a copy gets a storage of its own, because torch.save writes whole storages
            flat = torch.from_numpy(whole[place : place + tensor.nbytes])
            copies.append(flat.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor, non_blocking=True)
        return copies

    def _allocate(self, size: int) -> bool:
        """Replace the buffer by one of `size` bytes, if there is room for it."""
        self._unlock()
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # gives the smaller one back
        free = int(psutil.virtual_memory().available * (1 - LEFT)) // self._ranks_here
        if size > free:
            logger.warning(
                "a checkpoint's copy takes %.1f GB of host memory for each of %d ranks, and %.1f GB are free for one: "
                "saving without a copy, and training waits until it is written",
                *(size / 1e9, self._ranks_here, free / 1e9),
            )
            return False
        self._buffer = torch.zeros(size, dtype=torch.uint8, device="cpu")
        try:
            if device.lock_pages(self._buffer):
                self._unlock = weakref.finalize(self, device.unlock_pages, self._buffer)
        except RuntimeError as error:
            logger.warning("saving through pageable host memory, which is slower: %s", error)
        return True
