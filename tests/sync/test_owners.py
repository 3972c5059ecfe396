"""Owners of pipeline stages and experts send their own weights: all arrive, and none crosses between the trainers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.engine.server_process import ManagedProcess
from tests.megatron.tiny import hf_dir, make_args
from tests.sync.served import serving

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "PP2, tied": ("qwen2", 2, {"pipeline_model_parallel_size": 2}),
    "TP2 PP2": (
        "glm4",
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "TP2, EP2, ETP1": (
        "glm4_moe",
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "TP2, EP2, ETP2": (
        "glm4_moe",
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
        },
    ),
    "EP2, a replica": ("qwen3_moe", 4, {"expert_model_parallel_size": 2}),
    "PP2 EP2": (
        "qwen3_moe",
        4,
        {
            "pipeline_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "decoder_last_pipeline_num_layers": 1,
        },
    ),
}
"""The family, the number of trainers, and the flags."""


@contextmanager
def counted(found: list[tuple[int, int]]) -> Iterator[None]:
    """Add (size of the group, bytes received) of each tensor that goes from trainer to trainer."""
    broadcast, gather = dist.broadcast, dist.all_gather_into_tensor

    def count(tensor: Tensor, group: Any) -> None:
        found.append((dist.get_world_size(group), tensor.nbytes))

    def counting_broadcast(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        count(tensor, group)
        return broadcast(tensor, *args, group=group, **kwargs)

    def counting_gather(output: Tensor, tensor: Tensor, group: Any = None, **kwargs: Any) -> Any:
        count(output, group)
        return gather(output, tensor, group=group, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counting_broadcast)
        patch.setattr(dist, "all_gather_into_tensor", counting_gather)
        yield


class Source:
    """The weights of an HF directory in a sharded model, as a trainer holds them."""

    params_dtype = torch.float32

    def __init__(self, args: Args) -> None:
        from slime.megatron.model.build import build_model
        from slime.megatron.model.hf_weights import load_hf_into
        from slime.models.hf_files import HFReader

        assert args.hf_checkpoint is not None and args.architecture is not None
        self.args, self.architecture = args, args.architecture
        self.model = build_model(args, wrap=False)
        load_hf_into(self.model, args.architecture, HFReader(args.hf_checkpoint), args)

    def iter_hf_tensors(self) -> Iterator[tuple[str, Tensor]]:
        from slime.megatron.model.hf_weights import iter_hf_tensors

        return iter_hf_tensors(self.model, self.architecture)

    def weight_parts(self) -> Any:
        from slime.megatron.model.hf_weights import weight_parts

        return weight_parts(self.model, self.architecture)

    def save_hf(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        from slime.megatron.model.hf_weights import save_hf

        assert self.args.hf_checkpoint is not None
        save_hf(path, self.model, self.architecture, self.args.hf_checkpoint, dtype=dtype)


def send_and_prove(
    rank: int, world_size: int, init_method: str, args: Args, urls: Sequence[str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], dict[str, float], str]:
    """Send three versions: the first is proven, and the third has NaN on the last rank.

    Return what went between trainers in the second sync, and if weights are gathered whole; the metrics; the error.
    """
    from slime.sync.owners import OwnersTransport
    from slime.sync.sender import WeightSender

    with joined(args, rank, world_size, init_method):
        source = Source(args)
        sender = WeightSender(args, source, rank=rank, backend="gloo")
        sender.trained("loaded for a test")
        sender.connect("", urls, [1] * len(urls))
        assert isinstance(sender._transport, OwnersTransport)
        sender.send(1)
        own: list[tuple[int, int]] = []
        whole: list[tuple[int, int]] = []
        with counted(own):
            metrics = sender.send(2)
        with counted(whole):
            for _ in source.iter_hf_tensors():
                continue
        if rank == world_size - 1:
            weights = source.model[0].named_parameters()
            with torch.no_grad():
                next(weight for name, weight in weights if "linear_qkv" in name).view(-1)[0] = math.nan
        error = ""
        try:
            sender.send(3)
        except RuntimeError as caught:
            error = str(caught)
        if rank == 0:
            versions = sender._transport.versions()
            assert set(versions.values()) == {"2"}, f"weights with NaN are never a whole set: {versions} {error}"
        sender._transport.leave()
        return own, whole, metrics, error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_owners_send_their_own_weights(workers: WorkerPool, tmp_path: Path, layout: str) -> None:
    family, world_size, flags = LAYOUTS[layout]
    actor, start = hf_dir(tmp_path / "actor", family), hf_dir(tmp_path / "start", family, seed=1)
    args = make_args(
        actor,
        rollout_engine="embedded",
        rollout_num_gpus=1,
        update_weight_buffer_size=30_000,
        update_weight_disk_dir=str(tmp_path / "proof"),
        **flags,
    )
    with serving(start, tmp_path, engines=1, router=False) as engines:
        results = workers.run(world_size, send_and_prove, args, urls_of(engines))
    total = results[0][2]["sync/gb"] * 1e9
    held = sum(file.stat().st_size for file in actor.glob("*.safetensors"))
    assert 0.9 * held < total <= held, "rank 0 reports the bytes of all owners"
    tensor_size = flags.get("tensor_model_parallel_size", 1)
    for own, whole, metrics, error in results:
        assert all(size in (1, tensor_size) for size, _ in own), "weights went from one stage or expert rank to another"
        if tensor_size == 1:
            assert own == []
        assert sum(size for _, size in whole) > total / 4, "control: gathering whole weights moves them"
        assert "not finite" in error
        assert metrics == results[0][2] or not metrics


def lose_an_engine(
    rank: int, world_size: int, init_method: str, args: Args, urls: Sequence[str], pid: int
) -> tuple[str, str]:
    """Lose an engine in the last stage's turn of the first sync, and send again to the other; return the errors."""
    from slime.sync.owners import OwnersTransport
    from slime.sync.sender import WeightSender

    class Deadly(Source):
        def weight_parts(self) -> Any:
            return [replace(part, tensors=partial(self.dying, part)) for part in super().weight_parts()]

        def dying(self, part: Any) -> Iterator[tuple[str, Tensor]]:
            for number, each in enumerate(part.tensors()):
                if part.sent and part.turn == 1 and number == 1 and psutil.pid_exists(pid):
                    psutil.Process(pid).kill()
                yield each

    with joined(args, rank, world_size, init_method), pytest.MonkeyPatch.context() as patch:
        patch.setattr("slime.engine.connection.BACKOFF", 0.01)
        sender = WeightSender(args, Deadly(args), rank=rank, backend="gloo")
        sender.trained("loaded for a test")
        sender.connect("", urls, [1, 1])
        errors = ["", ""]
        try:
            sender.send(1)
        except RuntimeError as caught:
            errors[0] = str(caught)
        sender.connect("", urls[:1], [1])
        try:
            sender.send(2)
        except RuntimeError as caught:
            errors[1] = str(caught)
        transport = sender._transport
        assert isinstance(transport, OwnersTransport)
        if rank == 0:
            assert transport.versions() == {urls[0]: "2"}
        transport.leave()
        return errors[0], errors[1]


def test_all_trainers_go_on_without_a_lost_engine(workers: WorkerPool, tmp_path: Path) -> None:
    actor, start = hf_dir(tmp_path / "actor", "glm4"), hf_dir(tmp_path / "start", "glm4", seed=1)
    args = make_args(
        actor,
        rollout_engine="embedded",
        rollout_num_gpus=2,
        update_weight_buffer_size=30_000,
        update_weight_disk_dir=str(tmp_path / "proof"),
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    with serving(start, tmp_path, engines=2, router=False) as engines:
        found = workers.run(4, lose_an_engine, args, urls_of(engines), engines[1].pid)
    assert urls_of(engines)[1] in found[0][0]
    assert [first for first, _ in found[1:]] == [""] * 3, "one error is enough for the driver"
    assert [again for _, again in found] == [""] * 4


def urls_of(engines: Sequence[ManagedProcess]) -> list[str]:
    return [engine.url for engine in engines]
