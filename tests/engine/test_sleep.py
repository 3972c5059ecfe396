"""The embedded engine gives its memory back, refuses to generate meanwhile, and takes weights through shared memory."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_size_t, c_void_p
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_server import call, generate, start_generation
from tiny_models import StartEngine

from slime.config.architecture import hf_architecture, read_hf_config
from slime.engine.client import EngineClient
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.memory import EngineMemory
from slime.engine.embedded.model import Model
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import EngineWeights
from slime.engine.sleep import FOR_GENERATION, FOR_WEIGHTS, put_to_sleep
from slime.models.hf_files import HFReader
from slime.sync.buckets import Buckets
from slime.sync.colocate import HostBuffer
from tests.forked_engine import ForkedEngine

IDS = [1, 40, 50]
EVERYTHING = ["weights", "kv_cache", "cuda_graph"]


@pytest.fixture(scope="module")
def engine(model_dirs: dict[str, Path], start_engine: StartEngine) -> ForkedEngine:
    return start_engine(model_dirs["glm4"], "--no-update-sessions")


def post(engine: ForkedEngine, path: str, body: Any) -> tuple[int, str]:
    status, answer = call(engine.url + path, body)
    return status, str(answer.get("message"))


def refusal(engine: ForkedEngine) -> str:
    status, answer = call(engine.url + "/generate", {"input_ids": IDS, "sampling_params": {"max_new_tokens": 1}})
    return str(answer["message"]) if status == 400 else ""


def named(model: Path) -> list[tuple[str, torch.Tensor]]:
    reader = HFReader(model)
    return [(name, reader.get(name)) for name in reader.names()]


def send(engine: ForkedEngine, tensors: list[tuple[str, torch.Tensor]], version: str | None) -> tuple[int, str]:
    buffer = HostBuffer()
    message = buffer.message([buffer.fill(next(Buckets(tensors, 2**30)))], version=version)
    result = post(engine, "/update_weights_from_tensor", message.to_json())
    buffer.free()
    return result


def test_a_sleeping_engine_refuses_until_restored(engine: ForkedEngine, model_dirs: dict[str, Path]) -> None:
    before = generate(engine, IDS, max_new_tokens=8, temperature=0.0)["output_ids"]
    checksum = call(engine.url + "/weights_checker", {"action": "checksum"})[1]["per_engine_checksum"]
    tensors = named(model_dirs["glm4"])

    async def sleep_and_take(*tags: Any) -> None:
        async with EngineClient("", engines=[engine.url]) as client:
            if not tags:
                await put_to_sleep(client)
            else:
                await client.resume_memory(tags)

    asyncio.run(sleep_and_take())
    assert "given back the memory of cuda_graph, kv_cache, weights" in refusal(engine)
    assert call(engine.url + "/server_info")[1]["released_memory"] == sorted(EVERYTHING)
    assert call(engine.url + "/health")[0] == 200
    for path, body in {
        "/weights_checker": {"action": "checksum"},
        "/update_weights_from_disk": {"model_path": str(model_dirs["glm4"])},
    }.items():
        status, message = post(engine, path, body)
        assert status == 400 and "was given back" in message
    assert send(engine, tensors, "1")[0] == 400
    status, message = post(engine, "/release_memory_occupation", {"tags": ["weights"]})
    assert status == 400 and "already" in message

    asyncio.run(sleep_and_take(*FOR_WEIGHTS))
    assert "kv_cache" in refusal(engine)
    asyncio.run(sleep_and_take(*FOR_GENERATION))
    assert "have not been sent since" in refusal(engine), "awake, and what its weights hold is undefined"
    assert post(engine, "/resume_memory_occupation", {"tags": ["weights"]})[0] == 400

    assert send(engine, tensors[:-1], None)[0] == 200
    assert "have not been sent since" in refusal(engine), "one tensor is missing"
    assert send(engine, tensors[-1:], "2")[0] == 200
    answer = generate(engine, IDS, max_new_tokens=8, temperature=0.0)
    assert (answer["output_ids"], answer["meta_info"]["weight_version"]) == (before, "2")
    assert call(engine.url + "/weights_checker", {"action": "checksum"})[1]["per_engine_checksum"] == checksum


def test_other_weights_come_as_they_are(engine: ForkedEngine, model_dirs: dict[str, Path]) -> None:
    """Send in two buckets, through a buffer that is used twice; then send the first weights again."""
    checksums: list[str] = []
    for name, version in (("glm4-b", "3"), ("glm4", "4")):
        tensors = named(model_dirs[name])
        buffer = HostBuffer()
        for part, part_version in ((tensors[:20], None), (tensors[20:], version)):
            message = buffer.message([buffer.fill(next(Buckets(part, 2**30)))], version=part_version)
            assert post(engine, "/update_weights_from_tensor", message.to_json())[0] == 200
        buffer.free()
        synced = call(engine.url + "/weights_checker", {"action": "checksum"})[1]["per_engine_checksum"]
        assert post(engine, "/update_weights_from_disk", {"model_path": str(model_dirs[name])})[0] == 200
        checksums.append(call(engine.url + "/weights_checker", {"action": "checksum"})[1]["per_engine_checksum"])
        assert synced == checksums[-1]
    assert len(set(checksums)) == 2


def test_wrong_memory_requests_are_refused(engine: ForkedEngine, tmp_path: Path) -> None:
    """Nothing is unpickled, and only memory files for weights are opened."""
    url = "/update_weights_from_tensor"
    status, message = post(engine, url, {"serialized_named_tensors": ["gASVBQAAAAAAAACMAWGULg=="]})
    assert status == 400 and "pickled" in message
    assert post(engine, url, {})[0] == 400
    name = "model.norm.weight"
    bucket = {"names": [name], "dtypes": ["float32"], "shapes": [[64]]}
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    with secret.open("rb") as file:
        for path, why in {
            str(secret): "/proc/PROCESS",
            f"/proc/{os.getpid()}/fd/../../../etc/passwd": "/proc/PROCESS",
            f"/proc/{os.getpid()}/fd/{file.fileno()}": "is no memory file",
            f"/proc/{os.getpid()}/fd/999": "No such file",
        }.items():
            status, message = post(engine, url, {"shared_memory": {"path": path, **bucket}})
            assert status == 400 and why in message
    memory = os.memfd_create("slime-weights")
    os.ftruncate(memory, 10)
    shared = {"shared_memory": {"path": f"/proc/{os.getpid()}/fd/{memory}", **bucket}}
    status, message = post(engine, url, shared)
    assert status == 400 and "holds 10 bytes" in message
    if os.getuid() == 0:  # only root can give a file away
        os.fchown(memory, 65534, 65534)
        status, message = post(engine, url, shared)
        assert status == 400 and "of this user" in message
    os.close(memory)
    assert post(engine, "/release_memory_occupation", {"tags": ["everything"]})[0] == 400
    assert refusal(engine) == "", "it goes on as before"


def test_sleep_ends_requests_before_memory_is_released(engine: ForkedEngine) -> None:
    async def run() -> dict[str, Any]:
        task = await start_generation(engine, IDS, max_new_tokens=400, temperature=1.0, ignore_eos=True)
        status, message = await asyncio.to_thread(post, engine, "/release_memory_occupation", {})
        assert status == 400 and "not finished" in message
        async with EngineClient("", engines=[engine.url]) as client:
            await put_to_sleep(client)
        return await task

    answer = asyncio.run(run())
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert "given back" in refusal(engine)


@contextmanager
def gap_in_the_heap(size: int) -> Iterator[None]:
    """Leave a gap of `size` bytes in the C heap, into which malloc places large tensors, as after other work."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = c_void_p, [c_size_t], [c_void_p]
    libc.free(libc.malloc(31 * 2**20))  # from now on, blocks below this size come from the heap
    *blocks, end = sorted(libc.malloc(16 * 2**20) for _ in range(size // (16 * 2**20) + 1))
    for block in blocks:
        libc.free(block)
    yield
    libc.free(end)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives back the heap's gaps")
def test_memory_is_really_free(model_dirs: dict[str, Path]) -> None:
    """It is, both where tensors have pages of their own and where they are in the heap."""
    for gap in (0, 96 * 2**20):
        with gap_in_the_heap(gap):
            check_free_memory(model_dirs["glm4"])


def check_free_memory(model_dir: Path) -> None:
    architecture = hf_architecture(
        {**read_hf_config(model_dir), "vocab_size": 65536, "hidden_size": 256, "tie_word_embeddings": False}
    )
    rss: Callable[[], int] = lambda: psutil.Process().memory_info().rss  # noqa: E731
    model = Model(architecture)
    cache = KVCache(architecture, dtype=torch.float32, rows=64, tokens=64 * 2048)
    scheduler = Scheduler(model, cache, on_finished=lambda done: None, on_failure=lambda error: None)
    weights = EngineWeights(model, scheduler)
    memory = EngineMemory(scheduler, weights)
    weights.reset()
    cache.reserve(1024, in_use=0)
    cache._kv.fill_(1)
    size = sum(tensor.nbytes for tensor in model.weights.values()) + cache._kv.nbytes
    full = rss()
    memory.release(["weights", "kv_cache"])
    released = rss()
    assert size > 150e6
    assert full - released > 0.95 * size
    memory.resume(["weights"])
    assert rss() - released > 0.95 * sum(tensor.nbytes for tensor in model.weights.values())
    assert all(bool((tensor == 0.5).all()) for tensor in model.weights.values()), "garbage, and of whole size"
