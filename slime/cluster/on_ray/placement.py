"""Placement: join or start Ray, and reserve a place for every process of the run.

- Called by: `running_processes`, before it starts an actor.
- Invariant: if Ray has GPUs, a bundle is one GPU (a process that computes on the CPU has a bundle of its own). Trainers
  get the first GPUs in rank order, node by node. Engines get the GPUs after them, each within one node. With --colocate
  engine i shares the GPUs of trainers i * n to i * n + n - 1.

For example, 4 trainers and 2 engines of 2 GPUs: with --colocate they take 4 GPUs (engine 0 shares those of trainers 0
and 1, engine 1 those of trainers 2 and 3), without it they take 8 GPUs.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.cluster.on_ray.own_session import children_in_own_sessions
from slime.config.args import Args
from slime.config.engine_kinds import AUTO, ON_CPU, ON_GPUS
from slime.config.object_store import local_store
from slime.config.resolve import cuda_devices
from slime.config.sharding import shard_optimizer
from slime.core.errors import RunError
from slime.core.printable import one_line
from slime.engine.server_process import find_free_port

# Ray counts processes on a CPU but does not limit them: with so small a share of a core, any number can be placed.
CPU_SHARE = 0.01
RESERVE_TIMEOUT_S = 60.0
SHARED_MEMORY = "/dev/shm"
"""Where Ray keeps its objects on Linux."""
# If a signal to the whole process group ends Ray's own processes first, nobody should wait a minute for them.
LOCAL_SYSTEM_CONFIG = {"gcs_rpc_server_reconnect_timeout_s": 5}


def start_ray(args: Args) -> str | None:
    """Join the cluster at RAY_ADDRESS and return None, or start a local one and return its session directory.

    The object store of a local one holds a rollout of `args`, as far as the machine has the memory.

    Raises:
        RunError: Ray does not start.
    """
    try:
        return _start_ray(args)
    except Exception as error:  # Ray raises whatever its parts raise; each of them means that there is no Ray
        raise RunError(f"Ray could not be started or joined: {one_line(str(error))}") from error


def _start_ray(args: Args) -> str | None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with children_in_own_sessions():
        started: Any = ray.init(
            address="local",
            num_gpus=cuda_devices(),  # torch's count: Ray's own may differ, and trainers use torch
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=local_store(args, _free_shared_memory()),
            _node_ip_address="127.0.0.1",
            _system_config=LOCAL_SYSTEM_CONFIG,
        )
    return started.address_info["session_dir"]


def _free_shared_memory() -> int:
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0


def object_store_bytes() -> int:
    """Return the size of all object stores of the cluster together."""
    return int(ray.cluster_resources().get("object_store_memory", 0))


def addresses_of_ray() -> dict[str, str]:
    """Return host:port of Ray's control store and of each node's raylet, by a name for messages."""
    head = ray.get_runtime_context().gcs_address
    found = {f"Ray's GCS (gcs_server at {head})": head}
    for node in (node for node in ray.nodes() if node["Alive"]):
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        found[f"Ray's raylet on node {node['NodeManagerAddress']} (at {address})"] = address
    return found


def num_gpus() -> int:
    """Return the number of GPUs in the whole cluster, free or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def choose_engine(args: Args, gpus: int) -> Args:
    """Decide what depends on the cluster: with GPUs it is SGLang and the distributed optimizer.

    Raises:
        RunError: SGLang is requested but there is no GPU, or it would compute in fp32.
    """
    if args.rollout_engine == AUTO:
        args = replace(args, rollout_engine=ON_GPUS if gpus else ON_CPU)
    args = shard_optimizer(args, on_gpus=gpus > 0)
    flag = f"--rollout-engine {args.rollout_engine}"
    if args.engine.on_gpus and args.starts_engines and not gpus:
        raise RunError(
            f"{flag}: Ray has no GPU, which {args.engine.label} needs; add --rollout-engine {ON_CPU} to generate on "
            "the CPU, or start Ray where there are GPUs"
        )
    if args.fp32_fault is not None:
        raise RunError(f"{flag}: {'; '.join(args.fp32_fault)}")
    return args


@dataclass(frozen=True)
class Slot:
    """One bundle with its GPU; `gpu_id` is None if it computes on the CPU."""

    bundle: int
    node_ip: str = ""
    gpu_id: str | None = None
    """The GPU as CUDA_VISIBLE_DEVICES names it on that node."""

    @property
    def order(self) -> tuple[tuple[int, int], tuple[int, str]]:
        """The sort key: node by node, and on each node by the GPU's number, so that neighbours are adjacent."""
        address = ipaddress.ip_address(self.node_ip)
        gpu = self.gpu_id or ""
        return (address.version, int(address)), (int(gpu), "") if gpu.isdecimal() else (-1, gpu)


@dataclass(frozen=True)
class Demand:
    """The number of processes of each kind to place."""

    num_trainers: int
    num_engines: int
    gpus_per_engine: int
    """The number of GPUs of one engine; 0 if engines compute on the CPU."""
    trainers_on_gpu: bool
    colocated: bool

    @property
    def num_gpus(self) -> int:
        trainers = self.num_trainers if self.trainers_on_gpu else 0
        engines = self.num_engines * self.gpus_per_engine
        return max(trainers, engines) if self.colocated else trainers + engines

    @property
    def num_cpu_processes(self) -> int:
        """The number of processes on CPUs; the rollout manager is one."""
        trainers = 0 if self.trainers_on_gpu else self.num_trainers
        return trainers + (0 if self.gpus_per_engine else self.num_engines) + 1


def demand(args: Args, gpus: int) -> Demand:
    """Return the places that `args` require in a cluster of `gpus` GPUs; the engine's kind is already decided."""
    return Demand(
        num_trainers=0 if args.debug_rollout_only else args.actor_world_size,
        num_engines=args.num_engines if args.starts_engines else 0,
        gpus_per_engine=args.gpus_per_engine,
        trainers_on_gpu=gpus > 0,
        colocated=bool(args.colocate),
    )


@dataclass(frozen=True)
class Layout:
    """The assignment of processes to slots."""

    trainers: tuple[Slot, ...]
    engines: tuple[tuple[Slot, ...], ...]
    """The slots of each engine in the order of its ranks; the engine's owner is in the first."""
    manager: Slot


def lay_out(want: Demand, gpus: Sequence[Slot], cpus: Sequence[Slot]) -> Layout:
    """Assign `want.num_gpus` GPUs and `want.num_cpu_processes` places on CPUs.

    Raises:
        RunError: an engine would span nodes.
    """
    gpus, free = sorted(gpus, key=lambda slot: slot.order), iter(cpus)
    on_gpu = want.num_trainers if want.trainers_on_gpu else 0
    trainers = gpus[:on_gpu] if want.trainers_on_gpu else [next(free) for _ in range(want.num_trainers)]
    size, first = want.gpus_per_engine, 0 if want.colocated else on_gpu
    engines = [
        tuple(gpus[first + index * size : first + (index + 1) * size]) if size else (next(free),)
        for index in range(want.num_engines)
    ]
    for index, slots in enumerate(engines):
        nodes = sorted({slot.node_ip for slot in slots})
        if len(nodes) > 1:
            raise RunError(
                f"--rollout-num-gpus-per-engine {size}: engine {index} would span the nodes {', '.join(nodes)}; an "
                "engine runs on one node: lower it, or let the processes that are placed before it fill whole nodes"
            )
    return Layout(trainers=tuple(trainers), engines=tuple(engines), manager=next(free))


def groups_across_nodes(args: Args, trainers: Sequence[Slot]) -> list[str]:
    """Return a warning for each kind of model-parallel group of which one spans nodes; a link inside is much faster.

    Megatron numbers its ranks so that the ranks of a tensor-parallel group are neighbours, those of a context-parallel
    group are inside a block of TP x CP, and those of an expert-parallel group inside a block of ETP x EP.
    """
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    experts, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_size
    blocks = {
        "--tensor-model-parallel-size": (tensor, tensor),
        "--context-parallel-size": (context, tensor * context),
        "--expert-model-parallel-size": (experts, expert_tensor * experts),
    }
    warnings: list[str] = []
    for flag, (size, block) in blocks.items():
        if size == 1:
            continue
        for first in range(0, len(trainers), block):
            nodes = sorted({slot.node_ip for slot in trainers[first : first + block]})
            if len(nodes) > 1:
                warnings.append(
                    f"WARNING {flag} {size}: trainers {first} to {first + block - 1} are on the nodes "
                    f"{', '.join(nodes)}, so their collectives use the network between nodes, which is many times "
                    "slower than the links inside one: choose a size that divides the GPUs of a node, and let the "
                    "trainers fill whole nodes"
                )
                break
    return warnings


@dataclass(frozen=True)
class Placement:
    """The reserved bundles with their assignment."""

    group: PlacementGroup
    want: Demand
    layout: Layout

    @property
    def num_trainers(self) -> int:
        return self.want.num_trainers

    @property
    def num_engines(self) -> int:
        return self.want.num_engines

    def trainer(self, rank: int) -> dict[str, Any]:
        """Return the Ray options of trainer `rank`, which sees only its own GPU."""
        slot = self.layout.trainers[rank]
        return self._options(slot) | ({} if slot.gpu_id is None else {"num_gpus": 1})

    def engine(self, index: int) -> dict[str, Any]:
        """Return the Ray options of the owner of engine `index`; it uses no GPU itself, and passes on its GPUs."""
        return self._options(self.layout.engines[index][0])

    def engine_gpu_ids(self, index: int) -> tuple[str, ...]:
        """Return the GPUs of engine `index` in the order of its ranks; none if it computes on the CPU."""
        return tuple(slot.gpu_id for slot in self.layout.engines[index] if slot.gpu_id is not None)

    def trainer_ranks_of_engine(self, index: int) -> list[int]:
        """Return the trainers that share devices with engine `index`, by its ranks; empty without --colocate."""
        if not self.want.colocated:
            return []
        size = self.want.gpus_per_engine or 1
        return [rank for rank in range(index * size, (index + 1) * size) if rank < self.num_trainers]

    def manager(self) -> dict[str, Any]:
        """Return the Ray options of the rollout manager."""
        return self._options(self.layout.manager)

    def rendezvous(self, directory: str) -> str:
        """Return where trainers meet: a file in `directory` if all are on this node, else a port of rank 0's node."""
        nodes = [slot.node_ip for slot in self.layout.trainers]
        if {*nodes} <= {"", ray.util.get_node_ip_address()}:
            return f"file://{directory}/rendezvous"
        port = ray.get(_free_port.options(**self._options(self.layout.trainers[0])).remote(nodes[0]))
        return f"tcp://{nodes[0]}:{port}"

    def _options(self, slot: Slot) -> dict[str, Any]:
        return {"num_cpus": CPU_SHARE, "scheduling_strategy": _in_bundle(self.group, slot.bundle)}

    def release(self) -> None:
        remove_placement_group(self.group)


def reserve(args: Args) -> Placement:
    """Reserve a GPU for every trainer and engine rank (shared with --colocate), and CPU places for everything else.

    Raises:
        RunError: the cluster has too few, or not within a minute, or an engine would span nodes.
    """
    there = num_gpus()
    want = demand(args, there)
    if want.num_gpus > there:
        raise RunError(_too_few(want, f"there are {there}"))
    on_gpus = [{"GPU": 1, "CPU": 2 * CPU_SHARE}] * want.num_gpus  # CPU shares of a trainer and an engine's owner
    group = placement_group([*on_gpus, *[{"CPU": CPU_SHARE}] * want.num_cpu_processes], strategy="PACK")
    if not group.wait(RESERVE_TIMEOUT_S):
        free = {name: ray.available_resources().get(name, 0) for name in ("GPU", "CPU")}
        remove_placement_group(group)
        raise RunError(_too_few(want, f"Ray has {free} free, and had no more for {RESERVE_TIMEOUT_S:.0f} s"))
    probes = [
        _which_gpu.options(num_cpus=0, num_gpus=1, scheduling_strategy=_in_bundle(group, bundle)).remote(bundle)
        for bundle in range(want.num_gpus)
    ]
    cpus = [Slot(bundle) for bundle in range(want.num_gpus, want.num_gpus + want.num_cpu_processes)]
    try:
        return Placement(group=group, want=want, layout=lay_out(want, ray.get(probes), cpus))
    except RunError:
        remove_placement_group(group)
        raise


def _too_few(want: Demand, there: str) -> str:
    shared = " together" if want.colocated else ""
    engines = f"{want.num_engines} engines" + (f" of {want.gpus_per_engine} GPUs" if want.gpus_per_engine else "")
    return (
        f"no room for {want.num_trainers} trainers and {engines}{shared}: they take {want.num_gpus} GPUs and "
        f"{want.num_cpu_processes} processes on CPUs, {there}. Free some, or lower --actor-num-gpus-per-node or "
        "--rollout-num-gpus"
    )


def _in_bundle(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)


@ray.remote
def _which_gpu(bundle: int) -> Slot:
    """Run inside the bundle, and return its node and GPU."""
    [gpu_id] = ray.get_gpu_ids()
    return Slot(bundle, node_ip=ray.util.get_node_ip_address(), gpu_id=str(gpu_id))


@ray.remote
def _free_port(address: str) -> int:
    return find_free_port(address)
