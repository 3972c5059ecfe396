"""The assignment of processes to GPUs: Ray believes the number that it is given, so no GPU is needed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from slime.cluster.on_ray.placement import (
    Demand,
    Placement,
    Slot,
    choose_engine,
    demand,
    groups_across_nodes,
    lay_out,
    num_gpus,
    reserve,
)
from slime.cluster.on_ray.ray_wait import Waiter
from slime.config.args import Args
from slime.core.errors import RunError
from tests.cluster.runs import small_ray


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    """Start a local Ray that believes in four GPUs, the last of eight."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,5,6,7"
    with small_ray(num_gpus=4):
        yield
    os.environ.pop("CUDA_VISIBLE_DEVICES")
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture
def place(four_gpus: None) -> Iterator[Callable[..., Placement]]:
    made: list[Placement] = []

    def make(**changes: Any) -> Placement:
        made.append(reserve(some_args(**changes)))
        return made[-1]

    yield make
    for placement in made:
        placement.release()


def some_args(**changes: Any) -> Args:
    return Args(**{"num_rollout": 1, "rollout_engine": "sglang", **changes})


@ray.remote
class Seen:
    """An actor that reports the GPUs that it sees."""

    def visible(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "unset")


def visible(*options: dict[str, Any]) -> list[str]:
    actors = [Seen.options(**each).remote() for each in options]
    seen = ray.get([actor.visible.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)  # pyright: ignore[reportArgumentType]
    return seen


def test_trainers_first_then_engines_next_to_each_other(place: Callable[..., Placement]) -> None:
    placement = place(actor_num_gpus_per_node=2, rollout_num_gpus=2, rollout_num_gpus_per_engine=2)
    assert [slot.gpu_id for slot in placement.layout.trainers] == ["4", "5"]
    assert placement.engine_gpu_ids(0) == ("6", "7")
    assert placement.trainer_ranks_of_engine(0) == []
    assert placement.rendezvous("/tmp/run") == "file:///tmp/run/rendezvous"


def test_colocation_places_both_on_the_same_gpus(place: Callable[..., Placement]) -> None:
    shared = {"actor_num_gpus_per_node": 4, "rollout_num_gpus": 4, "rollout_num_gpus_per_engine": 2, "colocate": True}
    placement = place(**shared)
    assert [placement.engine_gpu_ids(index) for index in (0, 1)] == [("4", "5"), ("6", "7")]
    assert [placement.trainer_ranks_of_engine(index) for index in (0, 1)] == [[0, 1], [2, 3]]
    everyone = [placement.trainer(3), placement.trainer(0), placement.engine(1)]
    assert visible(*everyone)[:2] == ["7", "4"], "all of them live at once"


def test_an_embedded_engine_takes_no_gpu(place: Callable[..., Placement]) -> None:
    placement = place(actor_num_gpus_per_node=4, rollout_num_gpus=2, rollout_engine="embedded")
    assert [slot.gpu_id for slot in placement.layout.trainers] == ["4", "5", "6", "7"]
    assert [placement.engine_gpu_ids(index) for index in (0, 1)] == [(), ()]


def test_external_engines_and_debugging_take_none(place: Callable[..., Placement]) -> None:
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    external = demand(some_args(actor_num_gpus_per_node=4, rollout_num_gpus=2, rollout_external_engines=urls), 4)
    assert (external.num_gpus, external.num_engines) == (4, 0)
    alone = place(actor_num_gpus_per_node=4, rollout_num_gpus=4, colocate=True, debug_rollout_only=True)
    assert (alone.num_trainers, alone.num_engines) == (0, 4)


def test_too_few_gpus_are_an_immediate_error(place: Callable[..., Placement]) -> None:
    with pytest.raises(RunError, match=r"3 trainers and 1 engines of 2 GPUs: they take 5 GPUs and .* there are 4"):
        place(actor_num_gpus_per_node=3, rollout_num_gpus=2, rollout_num_gpus_per_engine=2)
    assert place(actor_num_gpus_per_node=3, rollout_num_gpus=2, rollout_num_gpus_per_engine=2, colocate=True)


def test_auto_goes_by_rays_gpus(four_gpus: None) -> None:
    auto = some_args(rollout_engine="auto", rollout_num_gpus=1, bf16=True)
    assert choose_engine(auto, num_gpus()).rollout_engine == "sglang"
    assert choose_engine(auto, 0).rollout_engine == "embedded"
    assert choose_engine(some_args(rollout_engine="embedded", rollout_num_gpus=1), 4).rollout_engine == "embedded"
    with pytest.raises(RunError, match="Ray has no GPU"):
        choose_engine(some_args(rollout_num_gpus=1), 0)
    with pytest.raises(RunError, match="SGLang's kernels on CUDA compute in 16 bits"):
        choose_engine(some_args(rollout_engine="auto", rollout_num_gpus=1, bf16=False), 4)
    assert choose_engine(some_args(rollout_num_gpus=0), 0), "nothing is started"


def nodes(*counts: int) -> list[Slot]:
    """Return this many GPUs on 10.0.0.9, on 10.0.0.10, ..., in an arbitrary order."""
    slots = [Slot(0, f"10.0.0.{9 + node}", str(gpu)) for node, count in enumerate(counts) for gpu in range(count)]
    return slots[::-1]


def wanted(trainers: int, engines: int, size: int, *, colocated: bool = False) -> Demand:
    return Demand(
        num_trainers=trainers, num_engines=engines, gpus_per_engine=size, trainers_on_gpu=True, colocated=colocated
    )


def test_node_by_node_and_by_number() -> None:
    layout = lay_out(wanted(16, 2, 4), nodes(16, 8), [Slot(99)])
    assert [slot.gpu_id for slot in layout.trainers] == [str(gpu) for gpu in range(16)], "10 comes after 9"
    assert {slot.node_ip for slot in layout.trainers} == {"10.0.0.9"}
    assert [[slot.gpu_id for slot in engine] for engine in layout.engines] == [list("0123"), list("4567")]
    assert layout.manager == Slot(99)


def test_an_engine_stays_on_one_node() -> None:
    with pytest.raises(RunError, match=r"engine 0 would span the nodes 10\.0\.0\.10, 10\.0\.0\.9"):
        lay_out(wanted(2, 1, 4), nodes(4, 4), [Slot(99)])
    assert lay_out(wanted(4, 1, 4), nodes(4, 4), [Slot(99)])
    assert lay_out(wanted(8, 2, 4, colocated=True), nodes(4, 4), [Slot(99)])


def test_groups_of_trainers_across_nodes_are_named() -> None:
    whole, broken = (lay_out(wanted(8, 0, 1), nodes(*counts), [Slot(99)]).trainers for counts in ((4, 4), (3, 5)))
    spread = some_args(tensor_model_parallel_size=2, context_parallel_size=2)
    assert groups_across_nodes(spread, whole) == []
    tensor, context = groups_across_nodes(spread, broken)
    assert tensor.startswith(
        "WARNING --tensor-model-parallel-size 2: trainers 2 to 3 are on the nodes 10.0.0.10, 10.0.0.9"
    )
    assert context.startswith("WARNING --context-parallel-size 2: trainers 0 to 3 are on")
    assert groups_across_nodes(some_args(), broken) == [], "data parallel groups may"
    [larger] = groups_across_nodes(some_args(context_parallel_size=8), whole)
    assert "trainers 0 to 7" in larger
    [experts] = groups_across_nodes(some_args(expert_model_parallel_size=4), broken)
    assert experts.startswith("WARNING --expert-model-parallel-size 4: trainers 0 to 3")


def test_trainers_on_one_node_meet_at_a_file(place: Callable[..., Placement]) -> None:
    """The directory is on the driver's node, which may have no GPU."""
    here = place(actor_num_gpus_per_node=2, rollout_num_gpus=0, debug_train_only=True)
    assert here.rendezvous("/tmp/run") == "file:///tmp/run/rendezvous"
    trainers = tuple(replace(slot, node_ip="127.0.0.2") for slot in here.layout.trainers)  # another node than Ray's
    elsewhere = replace(here, layout=replace(here.layout, trainers=trainers))
    assert re.fullmatch(r"tcp://127\.0\.0\.2:\d+", elsewhere.rendezvous("/tmp/run"))
    on_cpus = replace(here, layout=replace(here.layout, trainers=tuple(Slot(slot.bundle) for slot in trainers)))
    assert on_cpus.rendezvous("/tmp/run") == "file:///tmp/run/rendezvous"


def test_phases_are_printed_while_engines_start(four_gpus: None, tmp_path: Path) -> None:
    """The task ends only after a call, so that it does not matter how long it takes to start."""
    called = tmp_path / "called"

    @ray.remote
    def slow() -> int:
        while not called.exists():
            time.sleep(0.05)
        return 5

    waiter = Waiter(where="/nowhere", limit=60.0, because="--phase-timeout")
    assert waiter.get("waiting", [slow.remote()], meanwhile=called.touch, every=0.2) == [5]
