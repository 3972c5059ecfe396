"""A trainer that sleeps: weights and optimizer state move to host memory, and their device memory is given back.

- Used by: under colocation (trainers and engines share devices), the worker around a Trainer calls this between
  training, sending weights, and sleep.
- Invariant: only storages are emptied and filled again. Every tensor, view and buffer of the model, its gradients and
  the optimizer stays the same object, and training continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from slime.megatron import device
from slime.megatron.model.build import ModelChunks, all_parameters
from slime.megatron.offload.host_memory import HostMemory
from slime.megatron.optim.optimizer_state import parts_of

SMALL = 512
"""Storages of at most this many bytes stay: one block of the device's allocator (Adam's step counts)."""


class TrainerMemory:
    """The device memory of a wrapped `model` and its `optimizer`, in three parts: weights, optimizer, gradients."""

    def __init__(self, model: ModelChunks, optimizer: MegatronOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._weights = _Part()
        self._state = _Part()
        self._gradients = _Part()

    def offload_optimizer(self) -> int:
        """Move optimizer state to host memory and drop gradients; return the bytes moved. Weights can still be sent."""
        weights = _storages(self._weight_tensors())
        gradients = _storages(self._gradient_tensors(), but=weights)
        state = _storages(self._state_tensors(), but=weights | gradients)
        moved = self._state.offload(list(state.values()), keep=True)
        self._gradients.offload(list(gradients.values()), keep=False)
        device.empty_cache()
        return moved

    def offload_weights(self) -> int:
        """Move the weights to host memory, too; return the bytes moved. Nothing can run until `reload`."""
        moved = self._weights.offload(list(_storages(self._weight_tensors()).values()), keep=True)
        device.empty_cache()
        return moved

    def reload(self) -> int:
        """Bring everything back, with gradients of zero; return the bytes moved. No-op if nothing is away."""
        return sum(part.reload() for part in (self._weights, self._state, self._gradients))

    def _weight_tensors(self) -> Iterator[Tensor]:
        yield from all_parameters(self._model)
        for buffer in self._buffers():
            if buffer.param_data is not None:
                yield buffer.param_data

    def _gradient_tensors(self) -> Iterator[Tensor]:
        for buffer in self._buffers():
            yield buffer.grad_data

    def _buffers(self) -> list[Any]:
        wrapped: Any = self._model
        return [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _state_tensors(self) -> Iterator[Tensor]:
        for part in parts_of(self._optimizer):
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


class _Part:
    """Storages that leave and come back together."""

    def __init__(self) -> None:
        self._host = HostMemory()
        self._away: list[tuple[torch.UntypedStorage, int]] = []
        self._kept = False

    def offload(self, storages: list[torch.UntypedStorage], *, keep: bool) -> int:
        """Empty the storages; with `keep`, `reload` restores their bytes. No-op if they are away already."""
        if self._away:
            return 0
        moved = self._host.store([_bytes(storage) for storage in storages]) if keep else 0
        self._away = [(storage, storage.nbytes()) for storage in storages]
        self._kept = keep
        for storage in storages:
            storage.resize_(0)
        return moved

    def reload(self) -> int:
        for storage, size in self._away:
            storage.resize_(size)
        tensors = [_bytes(storage) for storage, _ in self._away]
        moved = self._host.restore(tensors) if self._kept else 0
        if not self._kept:
            for tensor in tensors:
                tensor.zero_()
        self._away = []
        return moved


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))  # pyright: ignore[reportCallIssue, reportArgumentType]


def _storages(tensors: Iterable[Tensor], *, but: Iterable[int] = ()) -> dict[int, torch.UntypedStorage]:
    """Return the storages, each once and by address, that are on the training device and large enough to move."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.device().type and storage.nbytes() > SMALL:
            found[storage.data_ptr()] = storage
    return {address: storage for address, storage in found.items() if address not in set(but)}
