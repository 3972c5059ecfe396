"""Ray: joining or starting it, and reserving a place for every process of the run.

Path: `Cluster.start` calls this first. Invariant: a bundle is one device (on a CPU: one worker process); trainers take
the first bundles in rank order, engines the ones behind them.
"""

from __future__ import annotations

import logging
import os
import subprocess
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.cluster import reaper
from slime.config.args import Args

# On a CPU a worker process is counted, not measured: this share of a core lets any number of them be placed.
CPU_SHARE = 0.01
RESERVE_TIMEOUT_S = 60.0
LOCAL_OBJECT_STORE_BYTES = 1024**3
# Where a signal to the whole process group takes Ray's own processes first, nobody should wait a minute for them.
LOCAL_SYSTEM_CONFIG = {"gcs_rpc_server_reconnect_timeout_s": 5}


def start_ray() -> subprocess.Popen[bytes] | None:
    """Join the cluster at RAY_ADDRESS (returns None), or start a local one (returns its reaper)."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _system_config=LOCAL_SYSTEM_CONFIG,
    )
    return reaper.watch()


@dataclass(frozen=True)
class Placement:
    """The reserved bundles."""

    group: PlacementGroup
    num_trainers: int
    num_engines: int

    def trainer(self, rank: int) -> dict[str, Any]:
        """Ray options of trainer `rank`."""
        return self._options(rank)

    def engine(self, index: int) -> dict[str, Any]:
        """Ray options of the worker that owns engine `index`."""
        return self._options(self.num_trainers + index)

    def manager(self) -> dict[str, Any]:
        """Ray options of the rollout manager."""
        return self._options(self.num_trainers + self.num_engines)

    def _options(self, bundle: int) -> dict[str, Any]:
        return {
            "num_cpus": CPU_SHARE,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=bundle
            ),
        }

    def release(self) -> None:
        remove_placement_group(self.group)


def reserve(args: Args) -> Placement:
    """Reserve one bundle a trainer, one an engine, and one for the rollout manager.

    Raises:
        RuntimeError: the cluster has no room for them within a minute.
    """
    num_trainers = 0 if args.debug_rollout_only else args.actor_world_size
    num_engines = 0 if args.rollout_external_engines else args.num_engines
    count = num_trainers + num_engines + 1
    group = placement_group([{"CPU": CPU_SHARE}] * count, strategy="PACK")
    if not group.wait(RESERVE_TIMEOUT_S):
        available = ray.available_resources()
        remove_placement_group(group)
        raise RuntimeError(
            f"Ray has no room for {num_trainers} trainers, {num_engines} engines and the rollout manager within "
            f"{RESERVE_TIMEOUT_S:.0f} s; it has {available}. Free resources, or lower --actor-num-gpus-per-node or "
            "--rollout-num-gpus"
        )
    return Placement(group=group, num_trainers=num_trainers, num_engines=num_engines)
