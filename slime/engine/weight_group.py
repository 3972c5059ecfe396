"""WeightGroup: the process group over which a trainer sends weights to engines.

- Used by: `sync.broadcast` joins as rank 0 and sends. An engine joins on /init_weights_update_group and receives (the
  embedded engine through this module, SGLang through its own code).
- Invariant: rank 0 is the trainer. The rendezvous is `PrefixStore(group_name, TCPStore(...))`, as SGLang makes it. If
  all members are on one machine, nothing listens on other interfaces than loopback.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import Backend, _abort_process_group, _new_process_group_helper, _world

from slime.core.address import own_address


class WeightGroup:
    """A joined group. `broadcast` is collective: every member calls it with a tensor of the same size and dtype."""

    def __init__(self, group: dist.ProcessGroup, store: Store, *, timeout: timedelta, gloo: bool) -> None:
        self._group: dist.ProcessGroup | None = group
        self._store: Store | None = store
        self._timeout = timeout
        self._gloo = gloo

    def broadcast(self, tensor: Tensor, src: int = 0, *, after: Filled = None) -> None:
        """Send the contiguous `tensor` from rank `src`, or receive into it; afterwards the tensor may be changed.

        On a GPU this uses a stream of its own, which first waits for the event `after`, or without it for all work that
        the current stream has begun.

        Raises RuntimeError if a member is gone, or does not answer within the group's timeout.
        """
        group = self._group
        if group is None:
            raise RuntimeError("this weight group is closed")
        assert tensor.is_contiguous()
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        after = after or filled(tensor)
        if self._gloo:
            group.broadcast([_bytes_on_cpu(tensor, after)], options).wait(self._timeout)
            return
        with _stream_after(after, tensor.device):
            group.broadcast([tensor], options).wait(self._timeout)  # with a timeout, NCCL blocks the thread, too

    def close(self, *, broken: bool = False) -> None:
        """Leave the group. `broken` also ends a broadcast that has failed or still waits in another thread."""
        group, self._group, self._store = self._group, None, None
        if group is not None and not self._gloo:  # torch keeps the group in its table, under its name
            leave = _abort_process_group if broken else dist.destroy_process_group
            leave(group)


Filled = torch.cuda.Event | None
"""The event on a GPU after which a tensor is filled; None on a CPU, where it is filled when the call returns."""


def filled(tensor: Tensor) -> Filled:
    """Return the event after all work that the current stream has begun; None on a CPU."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _bytes_on_cpu(tensor: Tensor, after: Filled) -> Tensor:
    """Return the bytes for gloo, which does not support every dtype. A GPU tensor can only be sent (to CPU engines)."""
    if after is not None:
        after.synchronize()
    return tensor.view(-1).view(torch.uint8).cpu()


@contextmanager
def _stream_after(event: Filled, device: torch.device) -> Iterator[None]:
    """Use a new stream that waits for `event`, so this thread does not queue after another thread's work."""
    if event is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(event)
    with torch.cuda.stream(stream):  # also sets the device: a new thread begins on the first one
        yield
    stream.synchronize()  # covers NCCL's own stream: afterwards the caller may free or fill the memory


def join_weight_group(
    master_address: str,
    master_port: int,
    rank: int,
    world_size: int,
    group_name: str,
    backend: str,
    is_master: bool,
    *,
    timeout: float = 300.0,
) -> WeightGroup:
    """Wait for all members and join. `is_master`: this side hosts the store (the trainer does).

    Raises:
        RuntimeError: the members did not all join within `timeout` seconds.
    """
    limit = timedelta(seconds=timeout)
    store = _store(master_address, master_port, world_size, is_master, limit)
    prefixed = PrefixStore(group_name, store)
    gloo = backend == "gloo"
    if gloo:
        inner = PrefixStore("cpu/", PrefixStore(f"{group_name}/", prefixed))  # the prefixes that torch uses itself
        group = _gloo(inner, master_address, rank, world_size, limit)
    else:
        group = _as_torch_does(prefixed, rank, world_size, group_name, backend, limit)
    return WeightGroup(group, store, timeout=limit, gloo=gloo)


def _store(address: str, port: int, world_size: int, is_master: bool, timeout: timedelta) -> TCPStore:
    if not is_master:
        return TCPStore(address, port, world_size, False, timeout, wait_for_workers=False)
    # TCPStore itself binds every interface, so it gets a socket that is bound to this address only.
    listener = socket.create_server((address, port), backlog=128)
    return TCPStore(
        address, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _gloo(store: Store, master_address: str, rank: int, world_size: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make a gloo group on the address that leads to the master, without torch's default group."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(master_address))]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world_size, options)  # pyright: ignore[reportReturnType]


def _as_torch_does(
    store: Store, rank: int, world_size: int, group_name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Make the group as SGLang makes its side, key by key, so that NCCL's rendezvous matches (for CUDA)."""
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],  # as for torch's default group: its ranks are numbered by itself
        Backend(backend),
        store,
        group_name=cast(Any, group_name),  # as in SGLang: the prefix of the store's keys is made from it once more
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup)
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group
