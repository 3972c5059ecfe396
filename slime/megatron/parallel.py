"""Process groups: the rendezvous, Megatron's parallel state, seeds, and the Topology that other modules read.

- Used by: this is the first thing that a trainer does; `build` and everything after it finds its groups here.
- Invariant: ranks and sizes that are found at run time are in the Topology and in Megatron's parallel state, never in
  args.
"""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from slime.config.args import Args
from slime.config.pipeline_stages import num_chunks
from slime.megatron import device
from slime.megatron.compat import apply, cpu_layer


@dataclass(frozen=True)
class Topology:
    """This process's place in all groups. `dp` does not count context-parallel ranks, `dp_cp` does."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    dp_host_group: dist.ProcessGroup
    """The ranks of `dp_group` over gloo, for numbers on the host: nobody waits for a device."""
    tensor_device: torch.device
    """The device of this process's tensors."""

    @property
    def is_last_stage(self) -> bool:
        """True if this rank has the model's last layers; only there do log-probs and losses exist."""
        return self.pp_rank == self.pp_size - 1


def init_parallel(args: Args, *, rank: int, world_size: int, init_method: str) -> Topology:
    """Join the other `world_size - 1` processes and split them into Megatron's groups.

    `init_method` is torch's rendezvous URL: `file:///...` if all processes share a file system, else `tcp://...`.

    Raises:
        ValueError: the parallel sizes do not divide the number of processes.
    """
    stages, experts = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    sizes = {
        "tensor x pipeline x context": args.tensor_model_parallel_size * stages * args.context_parallel_size,
        "expert x expert tensor x pipeline": experts * args.expert_tensor_size * stages,
    }
    for what, size in sizes.items():
        if world_size % size:
            raise ValueError(
                f"{world_size} training processes, but {what} parallel is {size}: it has to divide them; change "
                f"--actor-num-nodes, --actor-num-gpus-per-node or the parallel sizes"
            )
    if args.deterministic:
        device.use_deterministic_algorithms()
    apply.install()
    cpu_layer.install()
    device.local_device(rank)
    device.set_threads(args.cpu_threads_per_process)
    if init_method.startswith("file:"):
        _bind_gloo_to_loopback()
    dist.init_process_group(
        device.backend_name(),
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=args.train_timeout),
    )
    with cpu_layer.layer():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=num_chunks(args) if num_chunks(args) > 1 else None,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=experts,
            expert_tensor_parallel_size=args.expert_tensor_size,
            distributed_timeout_minutes=args.train_timeout / 60,  # pyright: ignore[reportArgumentType]
        )
        topology = _topology(rank, world_size)
        seed = args.seed + 100 * topology.pp_rank
        # A checkpoint keeps the states of all of these: whatever draws from them (a hook, a layer) is reproducible.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
    return topology


def close_parallel() -> None:
    """Leave all groups; another `init_parallel` may follow in the same process."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _topology(rank: int, world_size: int) -> Topology:
    return Topology(
        rank=rank,
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=tensor_group(),
        pp_group=pipeline_group(),
        cp_group=_joined(parallel_state.get_context_parallel_group()),
        dp_group=_joined(parallel_state.get_data_parallel_group()),
        dp_cp_group=_joined(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        dp_host_group=_joined(parallel_state.get_data_parallel_group_gloo()),
        tensor_device=device.device(),
    )


def tensor_group() -> dist.ProcessGroup:
    """Return this rank's tensor-parallel group, for code that has no Topology."""
    return _joined(parallel_state.get_tensor_model_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """Return this rank's pipeline-parallel group, for code that has no Topology; a rank in it is a stage."""
    return _joined(parallel_state.get_pipeline_model_parallel_group())


@dataclass(frozen=True)
class ExpertPlace:
    """The part of the experts that this rank holds: those of `ep_rank`, of which each is cut into `etp_size` parts."""

    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    group: dist.ProcessGroup
    """The ranks of all parts of all experts; expert tensor ranks are neighbours in it."""
    tensor_group: dist.ProcessGroup
    """The ranks of all parts of this rank's experts."""


def expert_place() -> ExpertPlace:
    """Return this rank's place among the expert ranks, for code that has no Topology."""
    tensor = _joined(parallel_state.get_expert_tensor_parallel_group())
    return ExpertPlace(
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=dist.get_rank(tensor),
        etp_size=dist.get_world_size(tensor),
        group=_joined(parallel_state.get_expert_tensor_and_model_parallel_group()),
        tensor_group=tensor,
    )


def _joined(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "this rank is in none of the groups"
    return group


def _bind_gloo_to_loopback() -> None:
    """Keep gloo's sockets on the loopback: a file rendezvous is within one node. GLOO_SOCKET_IFNAME overrides it."""
    names = {name for _, name in socket.if_nameindex()}
    for loopback in ("lo", "lo0"):
        if loopback in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
