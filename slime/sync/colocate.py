"""Weights through the memory of a device that trainers and engines share: CUDA IPC, or shared memory on a CPU.

Path: where an engine's ranks sit on trainers' devices, each of those trainers lays the buckets of whole tensors into a
buffer of its own, the engine's first trainer gathers the handles of all of them and posts them. While the engine copies
one bucket, the next is laid out in a second buffer. Invariants: handles stand in the order of the engine's ranks; a
buffer is written again only when the engine has answered; the policy version comes with the last bucket only.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.engine.client import EngineClient
from slime.engine.device_protocol import MEMORY_FILE, SharedBucket, UpdateWeightsFromTensor
from slime.engine.keys import Keys
from slime.engine.weight_group import dtype_name
from slime.sync.stream import NamedTensor, buckets
from slime.sync.transport import SyncReport, Transport


class Buffer(ABC):
    """Memory that an engine can read, for one bucket at a time."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def fill(self, bucket: Sequence[NamedTensor]) -> Any:
        """Lay the tensors behind each other -> the handle that an engine needs; it can be pickled."""
        size = sum(tensor.nbytes for _, tensor in bucket)
        if self._flat is None or len(self._flat) < size:
            self.free()
            self._flat = self._allocate(size)
        begin = 0
        for _, tensor in bucket:
            end = begin + tensor.nbytes
            self._flat[begin:end].copy_(tensor.detach().reshape(-1).view(torch.uint8))
            begin = end
        return self._handle(self._flat[:size], bucket)

    def free(self) -> None:
        self._flat = None

    @abstractmethod
    def _allocate(self, size: int) -> Tensor: ...

    @abstractmethod
    def _handle(self, flat: Tensor, bucket: Sequence[NamedTensor]) -> Any: ...

    @staticmethod
    @abstractmethod
    def message(handles: Sequence[Any], *, version: str | None) -> UpdateWeightsFromTensor:
        """The message to an engine: one handle for each of its ranks."""


class DeviceBuffer(Buffer):
    """On this process's GPU, for SGLang: handles are made, and pickled, by SGLang's own code."""

    def __init__(self) -> None:
        super().__init__()
        from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore[reportMissingImports]
        from sglang.srt.utils.patch_torch import (  # pyright: ignore[reportMissingImports]
            monkey_patch_torch_reductions,
        )
        from sglang.srt.weight_sync.tensor_bucket import (  # pyright: ignore[reportMissingImports]
            FlattenedTensorMetadata,
        )

        allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
        if "expandable_segments:true" in allocator.lower():
            raise ValueError(
                f"PYTORCH_CUDA_ALLOC_CONF is {allocator}: with --colocate engines read weights in the trainers' own "
                "memory, and expandable segments cannot be shared; leave them out"
            )
        monkey_patch_torch_reductions()  # handles then name the GPU itself, and not its number in this process
        self._metadata: Any = FlattenedTensorMetadata
        self._serialize: Any = MultiprocessingSerializer.serialize

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))

    def _handle(self, flat: Tensor, bucket: Sequence[NamedTensor]) -> str:
        metadata: list[Any] = []
        begin = 0
        for name, tensor in bucket:
            end = begin + tensor.nbytes
            metadata.append(
                self._metadata(
                    name=name,
                    shape=tensor.shape,
                    dtype=tensor.dtype,
                    start_idx=begin,
                    end_idx=end,
                    numel=end - begin,  # SGLang counts bytes here
                )
            )
            begin = end
        torch.cuda.synchronize()  # what the engine reads has been written
        return self._serialize({"flattened_tensor": flat, "metadata": metadata}, output_str=True)

    def free(self) -> None:
        super().free()
        torch.cuda.ipc_collect()

    @staticmethod
    def message(handles: Sequence[Any], *, version: str | None) -> UpdateWeightsFromTensor:
        return UpdateWeightsFromTensor(
            serialized_named_tensors=list(handles),
            load_format="flattened_bucket",
            flush_cache=False,  # `paused` has seen to it
            weight_version=version,
        )


class HostBuffer(Buffer):
    """An anonymous memory file, for the embedded engine: it stands in no directory, and ends with this process."""

    def __init__(self) -> None:
        super().__init__()
        self._file: int | None = None

    def _allocate(self, size: int) -> Tensor:
        self._file = file = os.memfd_create(MEMORY_FILE, os.MFD_CLOEXEC)
        os.fchmod(file, 0o600)
        os.ftruncate(file, size)
        return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8)

    def _handle(self, flat: Tensor, bucket: Sequence[NamedTensor]) -> SharedBucket:
        return SharedBucket(
            path=f"/proc/{os.getpid()}/fd/{self._file}",
            names=[name for name, _ in bucket],
            dtypes=[dtype_name(tensor.dtype) for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
        )

    def free(self) -> None:
        super().free()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @staticmethod
    def message(handles: Sequence[Any], *, version: str | None) -> UpdateWeightsFromTensor:
        return UpdateWeightsFromTensor(shared_memory=handles[0], flush_cache=False, weight_version=version)


class ColocatedTransport(Transport):
    """Every trainer has one. All that it does is collective over the trainers; rank 0 alone asks all engines."""

    def __init__(
        self,
        client: EngineClient,
        *,
        rank: int,
        ranks_of_engines: Sequence[Sequence[int]],
        own: EngineClient | None,
        buffer: type[Buffer],
        bucket_bytes: int,
    ) -> None:
        """`ranks_of_engines`: the trainers on each engine's devices, in the order of its ranks. `own`: the client of
        the engine on this trainer's device; None where there is none."""
        super().__init__(client, bucket_bytes=bucket_bytes)
        self._rank = rank
        self._own = own
        self._members = next((list(ranks) for ranks in ranks_of_engines if rank in ranks), [])
        self._everyone = _gloo(list(range(dist.get_world_size())), rank)
        groups = [_gloo(ranks, rank) for ranks in ranks_of_engines]  # every trainer takes part in making each
        self._group = next((group for group in groups if group is not None), None)
        self._buffers = (buffer(), buffer()) if self._members else ()
        self._message = buffer.message

    @property
    def _leads(self) -> bool:
        """Whether this trainer speaks to the engine on its device."""
        return self._members[:1] == [self._rank]

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        start, waited = time.perf_counter(), 0.0
        if self._rank == 0:
            with self.updating() as waited:
                total = self._send_together(tensors, str(version))
        else:
            total = self._send_together(tensors, str(version))
        return SyncReport(seconds=time.perf_counter() - start - waited, bytes=total, waited=waited)

    def _send_together(self, tensors: Iterable[NamedTensor], version: str) -> int:
        """Between two moments at which all trainers stand: engines are paused, and all of them hold the weights."""
        _meet(self._everyone)
        try:
            with ThreadPoolExecutor(1, "weights") as poster:
                total = self._send_all(tensors, poster, version)
        finally:
            for buffer in self._buffers:
                buffer.free()
        _meet(self._everyone)
        return total

    def _send_all(self, tensors: Iterable[NamedTensor], poster: ThreadPoolExecutor, version: str) -> int:
        total = 0
        posting: Future[None] | None = None
        for number, (bucket, last) in enumerate(_with_last(buckets(tensors, self._bucket_bytes))):
            total += sum(tensor.nbytes for _, tensor in bucket)
            if not self._buffers:
                continue  # only its part of gathering is wanted
            handles = self._gathered(self._buffers[number % 2].fill(bucket))
            if posting is not None:
                posting.result()
            _meet(self._group)  # the engine has answered the bucket before: its buffer is free on all its devices
            if self._leads:
                posting = poster.submit(self._post, handles, version if last else None)
        if posting is not None:
            posting.result()
        _meet(self._group)
        return total

    def _gathered(self, handle: Any) -> list[Any]:
        """All members' handles in the order of the engine's ranks, for the one that leads."""
        if self._group is None:
            return [handle]
        found: list[Any] | None = [None] * len(self._members) if self._leads else None
        dist.gather_object((self._rank, handle), found, group=self._group, dst=self._members[0])
        by_rank = dict(found or [])  # torch sorts a group's ranks
        return [by_rank[rank] for rank in self._members] if self._leads else []

    def _post(self, handles: Sequence[Any], version: str | None) -> None:
        assert self._own is not None, "there is an engine on this device"
        self._runner.run(self._own.update_weights_from_tensor(self._message(handles, version=version)))

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        if self._own is not None:
            self._runner.run(self._own.close())
        super().close()


def connect(
    router_url: str,
    engine_urls: Sequence[str],
    ranks_of_engines: Sequence[Sequence[int]],
    *,
    rank: int,
    engines_on_cpu: bool,
    keys: Keys,
    bucket_bytes: int,
) -> ColocatedTransport:
    """The transport of trainer `rank`; every trainer calls this. `ranks_of_engines`: in the order of the URLs, the
    trainers on each engine's devices."""

    def client(urls: Sequence[str]) -> EngineClient:
        return EngineClient(router_url, engines=urls, keys=keys)

    led = [url for url, ranks in zip(engine_urls, ranks_of_engines, strict=True) if list(ranks[:1]) == [rank]]
    return ColocatedTransport(
        client(engine_urls),
        rank=rank,
        ranks_of_engines=ranks_of_engines,
        own=client(led) if led else None,
        buffer=HostBuffer if engines_on_cpu else DeviceBuffer,
        bucket_bytes=bucket_bytes,
    )


def _gloo(ranks: Sequence[int], rank: int) -> dist.ProcessGroup | None:
    """A group for small things, with its sockets on the host; None where nobody else is in it, or this rank is not."""
    if len(ranks) < 2:
        return None
    group = dist.new_group(list(ranks), backend="gloo")
    return group if rank in ranks and isinstance(group, dist.ProcessGroup) else None


def _meet(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)


def _with_last(items: Iterable[list[NamedTensor]]) -> Iterator[tuple[list[NamedTensor], bool]]:
    """Each item, and whether it is the last."""
    waiting: list[NamedTensor] | None = None
    for item in items:
        if waiting is not None:
            yield waiting, False
        waiting = item
    assert waiting is not None, "the model has no weights"
    yield waiting, True
