"""Weight-update sessions: each sync opens one at every engine that has them, and closes it in every case.

They run on two real engines: one takes weights only inside a session, as SGLang does from 0.5.21 on; one is older.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient, EngineError
from slime.engine.protocol import Endpoint
from slime.engine.server_process import ManagedProcess, ask, find_free_port
from slime.models.hf_files import HFReader
from slime.sync.broadcast import BroadcastTransport
from slime.sync.buckets import Buckets
from slime.sync.colocate import HostBuffer
from slime.sync.disk import DiskTransport
from slime.sync.proof import check_versions, prove_weights
from slime.sync.transport import Transport
from tests.engine.tiny_models import make_model
from tests.sync.served import serving

BEGIN, END = Endpoint.BEGIN_WEIGHT_UPDATE, Endpoint.END_WEIGHT_UPDATE
NONE_OPEN = (400, "no weight-update session is open; call begin_weight_update() first")
OUTSIDE = "must run between begin_weight_update() and end_weight_update()"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, "glm4", seed=seed) for seed, name in enumerate(("start", "actor"))}


@pytest.fixture(scope="module")
def fleet(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ManagedProcess]]:
    """Start an engine with sessions, and one without."""
    with serving(models["start"], tmp_path_factory.mktemp("logs"), engines=1, older=1, router=False) as processes:
        yield processes


def client(fleet: list[ManagedProcess]) -> EngineClient:
    return EngineClient("", engines=[engine.url for engine in fleet])


def by_broadcast(fleet: list[ManagedProcess]) -> BroadcastTransport:
    return BroadcastTransport(
        client(fleet),
        engine_ranks=[1, 1],
        address="127.0.0.1",
        port=find_free_port(),
        backend="gloo",
        bucket_bytes=50_000,
    )


@pytest.fixture(params=["broadcast", "disk"])
def transport(
    request: pytest.FixtureRequest, fleet: list[ManagedProcess], models: dict[str, Path], tmp_path: Path
) -> Iterator[Transport]:
    if request.param == "broadcast":
        made: Transport = by_broadcast(fleet)
    else:
        made = DiskTransport(
            client(fleet),
            directory=tmp_path,
            source_hf_dir=models["start"],
            dtype=torch.float32,
            bucket_bytes=50_000,
        )
    yield made
    made.close()


def weights(model: Path) -> list[NamedTensor]:
    reader = HFReader(model)
    return [(name, reader.get(name)) for name in reader.names()]


def post(engine: ManagedProcess, path: str, body: object = None) -> tuple[int, Any]:
    status, answer = ask(engine.url, "POST", body or {}, path=path)
    return status, answer.get("message")


def take_from_memory(engine: ManagedProcess, tensors: list[NamedTensor]) -> tuple[int, Any]:
    buffer = HostBuffer()
    message = buffer.message([buffer.fill(next(Buckets(tensors, 2**30)))], version="1")
    result = post(engine, Endpoint.UPDATE_WEIGHTS_FROM_TENSOR, message.to_json())
    buffer.free()
    return result


def test_an_engine_takes_weights_inside_a_session_only(fleet: list[ManagedProcess], models: dict[str, Path]) -> None:
    new, old = fleet
    tensors = weights(models["start"])
    distributed = {"names": [], "dtypes": [], "shapes": [], "group_name": "none"}
    assert post(new, END) == NONE_OPEN
    assert take_from_memory(new, tensors) == (400, f"update_weights_from_tensor {OUTSIDE}")
    assert post(new, Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, distributed) == (
        400,
        f"update_weights_from_distributed {OUTSIDE}",
    )
    assert post(new, BEGIN)[0] == 200
    assert post(new, BEGIN) == (400, "a weight-update session is already open; call end_weight_update() first")
    assert take_from_memory(new, tensors)[0] == 200
    assert "there is no weight group" in post(new, Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED, distributed)[1]
    assert post(new, END)[0] == 200
    assert post(new, END) == NONE_OPEN
    assert {post(old, path)[0] for path in (BEGIN, END)} == {404}
    assert take_from_memory(old, tensors)[0] == 200
    disk = {"model_path": str(models["start"])}
    assert {post(engine, Endpoint.UPDATE_WEIGHTS_FROM_DISK, disk)[0] for engine in fleet} == {200}


def test_old_and_new_engines_are_synced_together(
    fleet: list[ManagedProcess], models: dict[str, Path], transport: Transport
) -> None:
    for version in (1, 2):
        transport.send(weights(models["actor"]), version=version)
        check_versions(transport, version=version)
        assert len(set(transport.checksums().values())) == 1, "the engines hold the same weights"
    prove_weights(transport, models["actor"], version=2)
    assert post(fleet[0], END) == NONE_OPEN


def test_a_killed_runs_session_is_closed(
    fleet: list[ManagedProcess], models: dict[str, Path], transport: Transport
) -> None:
    assert post(fleet[0], BEGIN)[0] == 200
    transport.send(weights(models["actor"]), version=3)
    check_versions(transport, version=3)
    assert post(fleet[0], END) == NONE_OPEN


def test_a_failed_sync_leaves_no_session_open(fleet: list[ManagedProcess], models: dict[str, Path]) -> None:
    def failing() -> Iterator[NamedTensor]:
        yield from weights(models["start"])[:3]
        assert post(fleet[0], BEGIN)[0] == 400, "a session is open at this time"
        raise OSError("a trainer is gone")

    transport = by_broadcast(fleet)
    with pytest.raises(OSError, match="a trainer is gone"):
        transport.send(failing(), version=4)
    assert post(fleet[0], END) == NONE_OPEN
    transport.send(weights(models["start"]), version=5)
    check_versions(transport, version=5)
    transport.close()


def test_an_unclosable_session_fails_the_sync(fleet: list[ManagedProcess]) -> None:
    transport = by_broadcast(fleet)
    ended = rf"{fleet[0].url}{END} answered 400: no weight-update session is open"
    with pytest.raises(EngineError, match=ended), transport.updating():
        assert post(fleet[0], END)[0] == 200
    with transport.updating():  # the next sync works
        assert post(fleet[0], BEGIN)[0] == 400
    assert post(fleet[0], END) == NONE_OPEN
    transport.close()
