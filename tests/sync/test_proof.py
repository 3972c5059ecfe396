"""The proof of a weight sync passes for the actor's weights and for nothing else; over a real engine and router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.engine.launch import find_free_port, launch_engine, launch_router, register_worker
from slime.models.hf_files import HFReader
from slime.sync.broadcast import BroadcastTransport
from slime.sync.proof import check_versions, prove_weights
from slime.sync.stream import NamedTensor
from tests.engine.tiny_models import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, "glm4", seed=seed) for seed, name in enumerate(("start", "actor", "reference"))
    }


@pytest.fixture(scope="module")
def transport(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[BroadcastTransport]:
    """The trainer's end of a weight group with one engine, which serves the model 'start'."""
    logs = tmp_path_factory.mktemp("logs")
    port, router_port = find_free_port(), find_free_port()
    args = Args(hf_checkpoint=str(models["start"]))
    engine = launch_engine(args, index=0, host="127.0.0.1", port=port, log_path=logs / "engine.log")
    router = launch_router(args, host="127.0.0.1", port=router_port, log_path=logs / "router.log")
    try:
        for process in (engine, router):
            process.wait_ready(60)
        register_worker(router.url, engine.url)
        client = EngineClient(router.url)
        transport = BroadcastTransport(
            client, num_engine_ranks=1, address="127.0.0.1", port=find_free_port(), backend="gloo"
        )
        yield transport
        transport.close()
    finally:
        for process in (router, engine):
            process.stop()


def weights(model: Path) -> list[NamedTensor]:
    reader = HFReader(model)
    return [(name, reader.get(name)) for name in reader.names()]


def test_the_actors_export_is_proven(models: dict[str, Path], transport: BroadcastTransport) -> None:
    before = transport.checksums()
    report = transport.send(weights(models["actor"]), version=7, bucket_bytes=10_000)
    assert report.bytes == sum(tensor.nbytes for _, tensor in weights(models["actor"]))
    assert transport.checksums() != before
    prove_weights(transport, models["actor"], version=7)
    check_versions(transport, version=7)


def test_another_models_export_is_not(models: dict[str, Path], transport: BroadcastTransport) -> None:
    transport.send(weights(models["actor"]), version=8, bucket_bytes=10_000)
    with pytest.raises(ValueError, match=r"engines \[0\] do not hold the actor's weights"):
        prove_weights(transport, models["reference"], version=8)


def test_another_version_is_named(models: dict[str, Path], transport: BroadcastTransport) -> None:
    transport.send(weights(models["actor"]), version=9, bucket_bytes=10_000)
    with pytest.raises(ValueError, match=r"policy version 10 was sent, the engines report \['9'\]"):
        check_versions(transport, version=10)


def test_a_bucket_that_the_engine_refuses_ends_the_sync(transport: BroadcastTransport, models: dict[str, Path]) -> None:
    broken = [(f"no.such.{name}", tensor) for name, tensor in weights(models["actor"])]
    with pytest.raises(Exception, match=r"no\.such"):
        transport.send(broken, version=11, bucket_bytes=10**9)
