"""Weights through the memory of a device that trainers and engines share: CUDA IPC, or shared memory on a CPU.

- Where it sits: an engine's ranks run on trainers' devices. Each of those trainers copies every bucket of whole tensors
  into a buffer of its own. The engine's first trainer gathers the handles of all of them and posts them to the engine.
  While the engine copies one bucket, the trainers fill the next one in a second buffer.
- Invariant: handles are in the order of the engine's ranks. A buffer is written again only after the engine has
  answered. The policy version comes with the last bucket only.

For example, one engine with two ranks on the devices of trainers 0 and 1:

    trainer 0:  fill A  gather  meet  post A | fill B  gather  wait for the answer to A  meet  post B | fill A  ...
    trainer 1:  fill A  give    meet         | fill B  give                              meet         | fill A  ...
    engine:                             copy A, answer                                     copy B, answer

Both trainers meet after the answer to A, so neither fills A again while the engine still copies it.

A handle is a name for memory that is already on the device (CUDA IPC), so no weights travel over HTTP.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.engine.client import EngineClient
from slime.engine.device_protocol import MEMORY_FILE, SharedBucket, UpdateWeightsFromTensor
from slime.engine.keys import Keys
from slime.sync.buckets import Bucket, Buckets
from slime.sync.transport import Opening, SyncReport, Transport


class Buffer(ABC):
    """Memory that an engine can read, which holds one bucket at a time."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def fill(self, bucket: Bucket) -> Any:
        """Copy the tensors to their places in the buffer; return a handle for the engine, which can be pickled."""
        size = bucket.layout.num_bytes
        if self._flat is None or len(self._flat) < size:
            self.free()
            self._flat = self._allocate(size)
        flat = self._flat[:size]
        bucket.layout.fill(flat, bucket.tensors)
        return self._handle(flat, bucket.layout)

    def free(self) -> None:
        self._flat = None

    @abstractmethod
    def _allocate(self, size: int) -> Tensor: ...

    @abstractmethod
    def _handle(self, flat: Tensor, layout: BucketLayout) -> Any: ...

    @staticmethod
    @abstractmethod
    def message(handles: Sequence[Any], *, version: str | None) -> UpdateWeightsFromTensor:
        """Build the message to an engine: one handle for each of its ranks."""


class DeviceBuffer(Buffer):
    """A buffer on this process's GPU, for SGLang, whose own code makes and pickles the handles."""

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
        monkey_patch_torch_reductions()  # handles then name the GPU itself, not its number in this process
        self._metadata: Any = FlattenedTensorMetadata
        self._serialize: Any = MultiprocessingSerializer.serialize

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))

    def _handle(self, flat: Tensor, layout: BucketLayout) -> str:
        metadata = [
            self._metadata(
                name=place.name,
                shape=place.shape,
                dtype=place.dtype,
                start_idx=place.begin,
                end_idx=place.end,
                numel=place.end - place.begin,  # SGLang counts bytes here
            )
            for place in layout.places
        ]
        torch.cuda.synchronize()  # what the engine will read has been written
        return self._serialize({"flattened_tensor": flat, "metadata": metadata}, output_str=True)

    def free(self) -> None:
        super().free()
        torch.cuda.ipc_collect()

    @staticmethod
    def message(handles: Sequence[Any], *, version: str | None) -> UpdateWeightsFromTensor:
        return UpdateWeightsFromTensor(
            serialized_named_tensors=list(handles),
            load_format="flattened_bucket",
            flush_cache=False,  # `paused` has flushed it
            weight_version=version,
        )


class HostBuffer(Buffer):
    """An anonymous memory file, for the embedded engine: it has no name in a directory, and ends with this process."""

    def __init__(self) -> None:
        super().__init__()
        self._file: int | None = None

    def _allocate(self, size: int) -> Tensor:
        self._file = file = os.memfd_create(MEMORY_FILE, os.MFD_CLOEXEC)
        os.fchmod(file, 0o600)
        os.ftruncate(file, size)
        return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8)

    def _handle(self, flat: Tensor, layout: BucketLayout) -> SharedBucket:
        return SharedBucket(
            path=f"/proc/{os.getpid()}/fd/{self._file}",
            names=layout.names,
            dtypes=layout.dtypes,
            shapes=layout.shapes,
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
    """Sends weights through the memory of shared devices; every trainer has one, and all calls are collective.

    The first trainer on an engine's devices posts that engine's messages. Rank 0 pauses and checks all engines.
    """

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
        """`ranks_of_engines` are the trainers on each engine's devices, in the order of the engine's ranks. `own` is
        the client of the engine to which this trainer sends the messages: it is the first one on its devices."""
        super().__init__(client, bucket_bytes=bucket_bytes)
        self.asks_engines = rank == 0
        self._rank = rank
        self._own = own
        self._members = next((list(ranks) for ranks in ranks_of_engines if rank in ranks), [])
        self._everyone = _gloo(list(range(dist.get_world_size())), rank)
        groups = [_gloo(ranks, rank) for ranks in ranks_of_engines]  # every trainer takes part in making each group
        self._group = next((group for group in groups if group is not None), None)
        self._buffers = (buffer(), buffer()) if self._members else ()
        self._message = buffer.message

    @classmethod
    def open(cls, opening: Opening) -> ColocatedTransport:
        """Open it on every trainer: the first one on an engine's devices gets a client of that engine."""
        args, rank = opening.args, opening.rank

        def client(urls: Sequence[str]) -> EngineClient:
            return EngineClient(opening.router_url, engines=urls, keys=Keys.of(args))

        engines = zip(opening.engine_urls, opening.shared_with, strict=True)
        led = [url for url, ranks in engines if list(ranks[:1]) == [rank]]
        return cls(
            client(opening.engine_urls),
            rank=rank,
            ranks_of_engines=opening.shared_with,
            own=client(led) if led else None,
            buffer=HostBuffer if args.engines_on_cpu else DeviceBuffer,
            bucket_bytes=args.update_weight_buffer_size,
        )

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        start, waited = time.perf_counter(), 0.0
        if self._rank == 0:
            with self.updating() as waited:
                total = self._send_together(tensors, str(version))
        else:
            total = self._send_together(tensors, str(version))
        return SyncReport(seconds=time.perf_counter() - start - waited, bytes=total, waited=waited)

    def _send_together(self, tensors: Iterable[NamedTensor], version: str) -> int:
        """Send between two barriers: at the first all engines are paused, at the second all hold the weights."""
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
        own = self._own
        posting: Future[None] | None = None
        buckets = Buckets(tensors, self._bucket_bytes)
        for number, bucket in enumerate(buckets):
            total += bucket.layout.num_bytes
            carried = version if buckets.at_end() else None
            if not self._buffers:
                continue  # this trainer shares no device with an engine: it only takes part in gathering
            handles = self._gathered(self._buffers[number % 2].fill(bucket))
            if posting is not None:
                posting.result()
            _meet(self._group)  # the engine has answered the previous bucket: its buffer is free on all devices
            if own is not None:
                posting = poster.submit(self._post, own, handles, carried)
        if posting is not None:
            posting.result()
        _meet(self._group)
        return total

    def _gathered(self, handle: Any) -> list[Any]:
        """Return all members' handles in the order of the engine's ranks, on the trainer that leads."""
        if self._group is None:
            return [handle]
        found: list[Any] | None = [None] * len(self._members) if self._own is not None else None
        dist.gather_object((self._rank, handle), found, group=self._group, dst=self._members[0])
        by_rank = dict(found or [])  # torch sorts a group's ranks
        return [by_rank[rank] for rank in self._members] if self._own is not None else []

    def _post(self, engine: EngineClient, handles: Sequence[Any], version: str | None) -> None:
        self._runner.run(engine.update_weights_from_tensor(self._message(handles, version=version)))

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        if self._own is not None:
            self._runner.run(self._own.close())
        super().close()


def _gloo(ranks: Sequence[int], rank: int) -> dist.ProcessGroup | None:
    """Return a gloo group on the host for small messages; None for fewer than two ranks, or if `rank` is not in it."""
    if len(ranks) < 2:
        return None
    group = dist.new_group(list(ranks), backend="gloo")
    return group if rank in ranks and isinstance(group, dist.ProcessGroup) else None


def _meet(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)
