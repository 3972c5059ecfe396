"""The proof of a weight sync passes for the actor's weights and for no others, by every transport.

It runs on real engines and a router. The engines serve the model 'start' already, as a user's would.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient, EngineError
from slime.engine.membership import Membership
from slime.engine.protocol import WEIGHT_GROUP
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.models.hf_files import HFReader, write_hf
from slime.sync.broadcast import BroadcastTransport
from slime.sync.disk import DiskTransport
from slime.sync.proof import check_answers, check_versions, prove_weights
from slime.sync.transport import SyncReport, Transport
from tests.engine.tiny_models import make_model
from tests.sync.served import serving


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_model(root / name, "glm4", seed=seed) for seed, name in enumerate(("start", "actor", "reference"))
    }


@pytest.fixture(scope="module")
def served(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ManagedProcess]]:
    """Start two engines, and the router with which they are registered."""
    with serving(models["start"], tmp_path_factory.mktemp("logs"), engines=2) as processes:
        Membership(processes[-1].url).join([engine.url for engine in processes[:-1]])
        yield processes


def client(served: list[ManagedProcess]) -> EngineClient:
    *engines, router = served
    return EngineClient(router.url, engines=[engine.url for engine in engines])


def broadcast(served: list[ManagedProcess]) -> BroadcastTransport:
    return BroadcastTransport(
        client(served),
        engine_ranks=[1] * (len(served) - 1),
        address="127.0.0.1",
        port=find_free_port(),
        backend="gloo",
        bucket_bytes=10_000,
    )


def disk(served: list[ManagedProcess], models: dict[str, Path], directory: Path) -> DiskTransport:
    return DiskTransport(
        client(served),
        directory=directory,
        source_hf_dir=models["start"],
        dtype=torch.float32,
        bucket_bytes=50_000,
    )


@pytest.fixture(params=["broadcast", "disk"])
def transport(
    request: pytest.FixtureRequest, served: list[ManagedProcess], models: dict[str, Path], tmp_path: Path
) -> Iterator[Transport]:
    """Open the trainer's end for each test; the group that the previous one had joined was left."""
    made = broadcast(served) if request.param == "broadcast" else disk(served, models, tmp_path)
    yield made
    made.close()


def weights(model: Path) -> list[NamedTensor]:
    reader = HFReader(model)
    return [(name, reader.get(name)) for name in reader.names()]


def checksum(tensors: Iterable[NamedTensor]) -> str:
    """Return the embedded engine's checksum of tensors that no engine and no file has held."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def test_the_actors_export_is_proven(
    models: dict[str, Path], transport: Transport, served: list[ManagedProcess]
) -> None:
    actor = weights(models["actor"])
    report = transport.send(actor, version=7)
    assert report.bytes == sum(tensor.nbytes for _, tensor in actor)
    assert report.metrics()["sync/gb_per_s"] > 0
    assert transport.checksums() == {engine.url: checksum(actor) for engine in served[:-1]}
    prove_weights(transport, models["actor"], version=7)
    check_versions(transport, version=7)


def test_another_models_export_is_refused(
    models: dict[str, Path], transport: Transport, served: list[ManagedProcess]
) -> None:
    transport.send(weights(models["actor"]), version=8)
    with pytest.raises(RuntimeError, match="do not hold the actor's weights") as caught:
        prove_weights(transport, models["reference"], version=8)
    assert all(engine.url in str(caught.value) for engine in served[:-1])


class Counted(DiskTransport):
    """Counts the engines that read from the disk for the proof."""

    readers: tuple[str, ...] = ()

    def load_from_disk(self, path: str, *, version: int, engines: Collection[str] | None = None) -> None:
        assert engines is not None
        self.readers = tuple(engines)
        super().load_from_disk(path, version=version, engines=engines)


def test_one_engine_reads_for_all_alike(models: dict[str, Path], served: list[ManagedProcess], tmp_path: Path) -> None:
    first, second, _ = (process.url for process in served)
    counted = Counted(
        client(served), directory=tmp_path, source_hf_dir=models["start"], dtype=torch.float32, bucket_bytes=50_000
    )
    counted.send(weights(models["actor"]), version=16)
    prove_weights(counted, models["actor"], version=16)
    assert len(counted.readers) == 1
    Transport.load_from_disk(counted, str(models["reference"]), version=16, engines=[second])
    with pytest.raises(RuntimeError, match=f"do not hold the actor's weights: {second}") as caught:
        prove_weights(counted, models["actor"], version=16)
    assert f"{first} (" not in str(caught.value)
    assert sorted(counted.readers) == sorted([first, second]), "each checksum is compared"
    prove_weights(counted, models["actor"], version=16)
    counted.close()


def test_another_version_is_named(models: dict[str, Path], transport: Transport, served: list[ManagedProcess]) -> None:
    transport.send(weights(models["actor"]), version=9)
    with pytest.raises(RuntimeError, match=f"policy version 10 was sent, {served[0].url} reports 9"):
        check_versions(transport, version=10)


def test_a_refusal_by_engines_ends_the_sync(models: dict[str, Path], transport: Transport) -> None:
    broken = [(f"no.such.{name}", tensor) for name, tensor in weights(models["actor"])]
    with pytest.raises(RuntimeError, match=r"http://127[0-9.:]+.*(no\.such|has no .*model\.)"):
        transport.send(broken, version=11)
    assert "11" not in transport.versions().values()


def test_an_engine_broken_by_the_proof_is_named() -> None:
    before = {"http://a": [-1.0, -2.0], "http://b": [-3.0, -4.0]}
    check_answers(before, {"http://a": [-1.0, -2.01], "http://b": [-3.0, -4.0]})
    for wrong in (-4.1, float("nan")):
        with pytest.raises(RuntimeError, match=r"other log-probs than before: http://b \("):
            check_answers(before, {"http://a": [-1.0, -2.0], "http://b": [-3.0, wrong]})


class Stale(DiskTransport):
    """A bug: after a sync the engines load old weights under the new version, so only their report is right."""

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        report = super().send(tensors, version=version)
        self.load_from_disk(str(self._source), version=version)
        return report


def test_weights_of_an_earlier_version_are_no_proof(
    models: dict[str, Path], served: list[ManagedProcess], tmp_path: Path
) -> None:
    """The version alone would not show it, nor would a comparison with the directory that the engines read."""
    stale = Stale(
        client(served), directory=tmp_path, source_hf_dir=models["start"], dtype=torch.float32, bucket_bytes=50_000
    )
    stale.send(weights(models["actor"]), version=12)
    check_versions(stale, version=12)
    prove_weights(stale, models["start"], version=12)  # the directory that they were asked to read
    write_hf(tmp_path / "export", weights(models["actor"]), models["start"], torch.float32)
    stale.send(weights(models["actor"]), version=12)
    with pytest.raises(RuntimeError, match="do not hold the actor's weights"):
        prove_weights(stale, tmp_path / "export", version=12)
    stale.close()


def test_a_killed_runs_group_is_no_obstacle(models: dict[str, Path], served: list[ManagedProcess]) -> None:
    broadcast(served)  # never closed
    second = broadcast(served)
    second.send(weights(models["actor"]), version=13)
    assert second.versions() == {engine.url: "13" for engine in served[:-1]}
    second.close()


def test_a_dead_engine_is_named(
    models: dict[str, Path], served: list[ManagedProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine dies inside a broadcast, and the other one serves again. This is the last test of `served`."""
    monkeypatch.setattr("slime.engine.connection.BACKOFF", 0.01)
    by_disk, by_broadcast = disk(served, models, tmp_path), broadcast(served)
    actor = weights(models["actor"])

    def dying() -> Iterator[NamedTensor]:
        yield from actor[: len(actor) // 2]
        psutil.Process(served[1].pid).kill()
        yield from actor[len(actor) // 2 :]

    with pytest.raises(RuntimeError, match=f"{served[1].url}(/update_weights_from_distributed did not| did not|/)"):
        by_broadcast.send(dying(), version=14)
    began = time.monotonic()
    alone = [served[0], served[-1]]

    async def hanging() -> list[str]:
        async with client(alone) as asking:
            return await asking.presence.hanging(WEIGHT_GROUP)

    assert asyncio.run(hanging()) == [], "the other one has left the broken broadcast"
    again = broadcast(alone)
    again.send(actor, version=15)
    check_versions(again, version=15)
    assert again.prompt_log_probs([1, 2, 3]).keys() == {served[0].url}
    print(f"serves again after {time.monotonic() - began:.2f} s")
    prove_weights(again, models["actor"], version=15)
    again.close()
    with pytest.raises(RuntimeError, match=f"{served[1].url}.* did not load policy version 16"):
        by_disk.send(actor, version=16)
    by_disk.close()
    by_broadcast.leave()


def test_a_stopped_engine_hangs_and_is_not_gone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.engine.connection.BACKOFF", 0.01)
    with serving(models["start"], tmp_path, engines=2, router=False) as engines:
        urls = [engine.url for engine in engines]

        async def inner() -> None:
            async with EngineClient("", engines=urls) as asking:
                assert await asking.presence.hanging(WEIGHT_GROUP) == [], "engines without a group do not hang"
                psutil.Process(engines[0].pid).suspend()
                watch = asyncio.ensure_future(asking.presence.until_one_is_gone())
                assert await asking.presence.hanging(WEIGHT_GROUP, within=1.5) == urls[:1]
                assert not watch.done(), "it is not gone"
                psutil.Process(engines[1].pid).kill()
                with pytest.raises(EngineError, match=f"{urls[1]} did not answer: nothing listens there"):
                    await watch
                psutil.Process(engines[0].pid).resume()
                assert await asking.presence.hanging(WEIGHT_GROUP) == [], "one that is gone does not hang"

        asyncio.run(inner())
