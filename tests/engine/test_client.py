"""Two engines with a real router, and a trainer's side of a weight update in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import tiny_models
from tiny_models import StartEngine

from slime.config.args import Args
from slime.engine.bucket_layout import BucketLayout
from slime.engine.client import EngineClient, EngineError
from slime.engine.connection import LOST_ENGINE, Connection
from slime.engine.keys import NO_KEYS, Keys, with_keys
from slime.engine.launch import launch_engine, launch_router
from slime.engine.membership import register_worker
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams, UpdateWeightsFromDistributed
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.engine.weight_group import WeightGroup, join_weight_group
from slime.models.hf_files import HFReader
from tests.forked_engine import ForkedEngine

T = TypeVar("T")
GROUP = "test_group"


@pytest.fixture(scope="module")
def engines(model_dirs: dict[str, Path], start_engine: StartEngine) -> Iterator[list[ForkedEngine]]:
    started = [start_engine(model_dirs["glm4"]) for _ in range(2)]
    yield started
    for engine in started:
        engine.stop()


@pytest.fixture(scope="module")
def router(engines: list[ForkedEngine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedProcess]:
    log = tmp_path_factory.mktemp("router") / "router.log"
    process = launch_router(
        Args(num_rollout=1, router={"health_check_interval_secs": 1}),
        host="127.0.0.1",
        port=find_free_port(),
        log_path=log,
    )
    process.wait_ready(60)
    for engine in engines:
        register_worker(process.url, engine.url)
    yield process
    process.stop()


def run(router: ManagedProcess, function: Callable[[EngineClient], Coroutine[Any, Any, T]]) -> T:
    async def inner() -> T:
        async with EngineClient(router.url, request_timeout=60) as client:
            return await function(client)

    return asyncio.run(inner())


def request(ids: list[int], **params: Any) -> GenerateRequest:
    return GenerateRequest(input_ids=ids, sampling_params=SamplingParams(**params))


def test_requests_are_spread_and_their_fields_arrive(
    router: ManagedProcess, engines: list[ForkedEngine], model_dirs: dict[str, Path]
) -> None:
    async def ask(client: EngineClient) -> tuple[list[str], list[GenerateResponse]]:
        asked = [request([1, 2, 3], max_new_tokens=9, temperature=0.7, sampling_seed=8) for _ in range(300)]
        return await client.workers(), await asyncio.gather(*map(client.generate, asked))

    workers, responses = run(router, ask)
    assert workers == sorted(e.url for e in engines)
    # One seed gives one response, whichever engine answers: the router passes on temperature and sampling_seed.
    assert len({tuple(r.output_ids) for r in responses}) == 1
    first = responses[0]
    assert (first.finish_reason, first.weight_version, first.prompt_tokens, first.completion_tokens) == (
        "length",
        "0",
        3,
        9,
    )
    want = tiny_models.hf_log_probs(tiny_models.hf_model(model_dirs["glm4"]), [1, 2, 3, *first.output_ids], 0.7)[2:]
    assert max(abs(a - b) for a, b in zip(want, first.log_probs, strict=True)) <= 1e-5


def test_an_engines_refusal_keeps_its_words_and_pickles(router: ManagedProcess) -> None:
    with pytest.raises(EngineError, match="longer than the model's context length") as caught:
        run(router, lambda client: client.generate(request([1] * 600)))
    assert caught.value.status == 400
    assert router.url in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.status) == (EngineError, str(caught.value), 400)


def test_a_lost_engines_request_goes_to_another(
    engines: list[ForkedEngine], start_engine: StartEngine, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """The router still lists the engine, and answers 500 for it until a health check fails."""
    args = Args(num_rollout=1, router={"health_check_interval_secs": 600})
    router = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "router.log")

    async def generate() -> tuple[EngineError, GenerateResponse]:
        body = request([1], max_new_tokens=2)
        async with EngineClient(router.url, patience=60) as client:
            connection = Connection(lambda url: None)
            with pytest.raises(EngineError) as once:
                await connection.request("POST", lambda: f"{router.url}/generate", body, timeout=60, collective=True)
            await connection.close()
            asking = asyncio.create_task(client.generate(body))
            await asyncio.wait([asking], timeout=1)
            assert not asking.done(), "only the lost engine is there"
            register_worker(router.url, engines[0].url)
            return once.value, await asking

    try:
        router.wait_ready(60)
        lost = start_engine(model_dirs["glm4"])
        register_worker(router.url, lost.url)
        lost.stop()
        refusal, response = asyncio.run(generate())
        assert (refusal.status, LOST_ENGINE in refusal.message) == (500, True), "control: what the router answers"
        assert len(response.output_ids) == 2
    finally:
        router.stop()


def test_refused_requests_neither_close_engines_nor_wait(
    router: ManagedProcess, engines: list[ForkedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's router may count refused requests as failures, and answer 503 for engines that work."""
    monkeypatch.setattr("slime.engine.refusals.PROBE_EVERY", 0.5)
    refused, sound = request([1] * 600), request([1], max_new_tokens=2)

    async def refuse_many(client: EngineClient) -> None:
        for _ in range(30):
            with pytest.raises(EngineError) as caught:
                await client.generate(refused)
            if caught.value.status == 503:
                return

    async def then_generate(client: EngineClient) -> GenerateResponse:
        await refuse_many(client)
        return await client.generate(sound)

    assert len(run(router, then_generate).output_ids) == 2
    args = Args(num_rollout=1, router={"disable_circuit_breaker": False})
    usual = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "router.log")

    async def wait_in_vain() -> None:
        urls = [engine.url for engine in engines]
        async with EngineClient(usual.url, engines=urls) as client:
            await refuse_many(client)
        async with EngineClient(usual.url, engines=urls, patience=600) as client:
            with pytest.raises(EngineError, match="longer than the model's context length") as caught:
                await asyncio.wait_for(client.generate(refused), 60)
            assert caught.value.url.startswith(tuple(urls)), "control: the router has no more to say than 503"
            waiting = asyncio.create_task(client.generate(sound))
            await asyncio.sleep(2)
            assert not waiting.done(), "an engine would answer this one: it goes on waiting for the router"
            await client.abort_all()
            await asyncio.wait_for(waiting, 30)

    try:
        usual.wait_ready(60)
        for engine in engines:
            register_worker(usual.url, engine.url)
        asyncio.run(wait_in_vain())
    finally:
        usual.stop()


def test_a_missing_answer_names_the_url() -> None:
    url = f"http://127.0.0.1:{find_free_port()}"

    async def ask() -> None:
        async with EngineClient(url) as client:
            await client.workers()

    import slime.engine.connection as module

    before, module.BACKOFF = module.BACKOFF, 0.01
    try:
        with pytest.raises(EngineError, match=f"{url}/workers did not answer"):
            asyncio.run(ask())
    finally:
        module.BACKOFF = before


def test_a_generation_waits_for_a_restarting_router(router: ManagedProcess) -> None:
    """It waits as long as the client is patient, and ends at once if it is aborted meanwhile."""
    nobody = f"http://127.0.0.1:{find_free_port()}"

    async def ask() -> None:
        async with EngineClient(nobody, engines=[], patience=60) as client:
            aborted = asyncio.create_task(client.generate(request([1], max_new_tokens=5)))
            await asyncio.sleep(0.3)
            await client.abort_all()
            response = await asyncio.wait_for(aborted, 10)
            assert (response.finish_reason, response.output_ids) == ("abort", [])
            waiting = asyncio.create_task(client.generate(request([1], max_new_tokens=5)))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            client.set_router(router.url)
            assert len((await asyncio.wait_for(waiting, 20)).output_ids) == 5
            assert client.num_answered == 1
        async with EngineClient(nobody, engines=[], patience=0.1) as client:
            with pytest.raises(EngineError, match=f"{nobody}/generate did not answer"):
                await client.generate(request([1], max_new_tokens=5))

    asyncio.run(ask())


def test_requests_to_a_removed_engine_end(engines: list[ForkedEngine]) -> None:
    gone = f"http://127.0.0.1:{find_free_port()}"

    async def ask() -> None:
        async with EngineClient("", engines=[engines[0].url, gone]) as client:
            asking = asyncio.create_task(client.weight_versions())
            await asyncio.sleep(0.5)
            assert not asking.done(), "it may be on its way back"
            client.set_engines([engines[0].url])
            assert len(await asyncio.wait_for(asking, 15)) == 1

    asyncio.run(ask())


def test_a_paused_engine_makes_no_progress(router: ManagedProcess) -> None:
    async def ask() -> None:
        async with EngineClient(router.url, request_timeout=0.2) as client:
            await client.pause("in_place")
            with pytest.raises(EngineError, match=r"no engine has made progress for 0\.2 s"):
                await client.generate(request([1], max_new_tokens=5))
            await client.continue_()

    asyncio.run(ask())


def test_an_abort_reaches_every_engine(router: ManagedProcess) -> None:
    async def ask(client: EngineClient) -> list[GenerateResponse]:
        await client.pause("in_place")  # so that nothing ends before the abort
        tasks = [asyncio.create_task(client.generate(request([1, 2], max_new_tokens=500))) for _ in range(6)]
        await asyncio.sleep(1.0)
        await client.abort_all()
        responses = await asyncio.gather(*tasks)
        await client.continue_()
        return responses

    assert [r.finish_reason for r in run(router, ask)] == ["abort"] * 6


def send(
    router: ManagedProcess,
    model: Path,
    *,
    version: str | None,
    buckets: int = 3,
    load_format: str | None = None,
    leave_out: tuple[str, ...] = (),
    rename: dict[str, str] | None = None,
    flush_cache: bool = True,
    meanwhile: Callable[[EngineClient], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Play the trainer's side: join as rank 0, send the tensors of an HF directory in buckets, leave."""

    async def inner(client: EngineClient) -> None:
        port, engines = find_free_port(), len(await client.workers())
        joining = asyncio.to_thread(
            join_weight_group, "127.0.0.1", port, 0, engines + 1, GROUP, "gloo", True, timeout=60
        )
        group, _ = await asyncio.gather(
            joining, client.init_weights_update_group("127.0.0.1", port, engines + 1, GROUP, "gloo")
        )
        try:
            reader = HFReader(model)
            names = [n for n in reader.names() if n not in leave_out]
            step = -(-len(names) // buckets)
            await client.update_sessions.begin()
            for i in range(0, len(names), step):
                part = names[i : i + step]
                last = i + step >= len(names)
                await send_bucket(client, group, reader, part, version if last else None)
                if meanwhile is not None and i == 0:
                    await meanwhile(client)
        finally:
            group.close()
            await client.update_sessions.end_left_open()
            await client.destroy_weights_update_group(GROUP)

    async def send_bucket(
        client: EngineClient, group: WeightGroup, reader: HFReader, part: list[str], version: str | None
    ) -> None:
        tensors = [reader.get(n) for n in part]
        layout = BucketLayout.of(((rename or {}).get(n, n), tensor) for n, tensor in zip(part, tensors, strict=True))

        def broadcast() -> None:
            for tensor in [layout.flatten(tensors)] if load_format else tensors:
                group.broadcast(tensor)

        await asyncio.gather(
            asyncio.to_thread(broadcast),
            client.update_weights_from_distributed(
                UpdateWeightsFromDistributed(
                    names=layout.names,
                    dtypes=layout.dtypes,
                    shapes=layout.shapes,
                    group_name=GROUP,
                    weight_version=version,
                    flush_cache=flush_cache,
                    load_format=load_format,
                )
            ),
        )

    run(router, inner)


def checksums(router: ManagedProcess) -> list[str]:
    return run(router, lambda client: client.weights_checksum())


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_weights_sent_equal_weights_loaded(
    router: ManagedProcess, model_dirs: dict[str, Path], load_format: str | None
) -> None:
    async def load(client: EngineClient, name: str, version: str) -> list[str]:
        await client.update_weights_from_disk(str(model_dirs[name]), version)
        return await client.weights_checksum()

    of_a = run(router, lambda client: load(client, "glm4", "1"))
    of_b = run(router, lambda client: load(client, "glm4-b", "2"))
    assert len(set(of_a)) == len(set(of_b)) == 1
    assert of_a != of_b
    run(router, lambda client: client.reset_weights())
    assert checksums(router) not in (of_a, of_b)  # control: a sync that does nothing is noticed
    seen: list[list[str]] = []

    async def meanwhile(client: EngineClient) -> None:
        seen.append(await client.weight_versions())

    send(router, model_dirs["glm4"], version="3", load_format=load_format, meanwhile=meanwhile)
    assert seen == [["2", "2"]]  # a set that is arriving has no version yet
    assert run(router, lambda client: client.weight_versions()) == ["3", "3"]
    assert checksums(router) == of_a
    response = run(router, lambda client: client.generate(request([1, 2, 3], max_new_tokens=8)))
    assert response.weight_version == "3"
    want = tiny_models.hf_log_probs(tiny_models.hf_model(model_dirs["glm4"]), [1, 2, 3, *response.output_ids], 1.0)[2:]
    assert max(abs(a - b) for a, b in zip(want, response.log_probs, strict=True)) <= 1e-5


def test_half_a_weight_set_stops_generation(router: ManagedProcess, model_dirs: dict[str, Path]) -> None:
    tasks: list[asyncio.Task[GenerateResponse]] = []

    async def meanwhile(client: EngineClient) -> None:
        # The client closes when `send` is through; this request outlives it with one of its own.
        other = EngineClient(router.url)
        tasks.append(asyncio.create_task(other.generate(request([5, 6], max_new_tokens=3))))
        tasks[0].add_done_callback(lambda _: asyncio.ensure_future(other.close()))
        await asyncio.sleep(0.7)
        assert not tasks[0].done()

    send(router, model_dirs["glm4-b"], version="4", meanwhile=meanwhile)
    response = run(router, lambda client: client.generate(request([5, 6], max_new_tokens=3)))
    assert response.weight_version == "4"


def test_a_wrong_bucket_is_refused_and_not_written(router: ManagedProcess, model_dirs: dict[str, Path]) -> None:
    before = checksums(router)
    norm, bias = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(EngineError, match=r"no tensor model\.norm\.wait") as caught:
        send(router, model_dirs["glm4"], version="9", buckets=1, rename={norm: "model.norm.wait"})
    assert caught.value.status == 400
    with pytest.raises(EngineError, match=r"is sent as \[64\], the model's is"):
        send(router, model_dirs["glm4"], version="9", buckets=1, rename={bias: "model.embed_tokens.weight"})
    assert checksums(router) == before


def test_an_incomplete_weight_set_is_refused(router: ManagedProcess, model_dirs: dict[str, Path]) -> None:
    versions = run(router, lambda client: client.weight_versions())
    with pytest.raises(EngineError, match=r"version 10 is incomplete: model\.norm\.weight did not arrive"):
        send(router, model_dirs["glm4-b"], version="10", leave_out=("model.norm.weight",))
    assert run(router, lambda client: client.weight_versions()) == versions

    async def held(client: EngineClient) -> GenerateResponse:
        task = asyncio.create_task(client.generate(request([5], max_new_tokens=2)))
        await asyncio.sleep(0.5)
        assert not task.done()
        await client.update_weights_from_disk(str(model_dirs["glm4"]), "12")
        return await task

    assert run(router, held).weight_version == "12"
    # A sender that gave up halfway may start over.
    send(router, model_dirs["glm4-b"], version=None, leave_out=("model.norm.weight",))
    send(router, model_dirs["glm4"], version="13")
    assert run(router, lambda client: client.weight_versions()) == ["13", "13"]


def test_a_checkpoint_of_another_model_is_refused(router: ManagedProcess, model_dirs: dict[str, Path]) -> None:
    before = checksums(router)
    with pytest.raises(EngineError, match="has no "):
        run(router, lambda client: client.update_weights_from_disk(str(model_dirs["qwen3"]), "5"))
    assert checksums(router) == before


def listening_addresses(pid: int | str) -> set[str]:
    """Return the addresses, as /proc/net has them, on which a process listens."""
    inodes: set[str] = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself, or closed since
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.add(words[1].split(":")[0])
    return found


def test_every_socket_is_on_loopback(router: ManagedProcess, engines: list[ForkedEngine]) -> None:
    seen: set[str] = set()

    async def inner(client: EngineClient) -> None:
        port = find_free_port()
        joining = asyncio.to_thread(join_weight_group, "127.0.0.1", port, 0, 3, "listen", "gloo", True, timeout=60)
        group, _ = await asyncio.gather(
            joining, client.init_weights_update_group("127.0.0.1", port, 3, "listen", "gloo")
        )
        for pid in ("self", engines[0].pid, router.pid):
            seen.update(listening_addresses(pid))
        group.close()
        await client.destroy_weights_update_group("listen")

    run(router, inner)
    assert seen == {"0100007F"}
    # Control: a socket on all interfaces is noticed.
    with socket.create_server(("0.0.0.0", 0)):
        assert listening_addresses("self") >= {"00000000"}


def test_an_engine_outlives_its_trainer(router: ManagedProcess) -> None:
    async def inner(client: EngineClient) -> None:
        port = find_free_port()
        joining = asyncio.to_thread(join_weight_group, "127.0.0.1", port, 0, 3, "gone", "gloo", True, timeout=60)
        group, _ = await asyncio.gather(joining, client.init_weights_update_group("127.0.0.1", port, 3, "gone", "gloo"))
        await client.update_sessions.begin()
        threading.Timer(0.5, group.close).start()
        del group
        with pytest.raises(EngineError, match="update_weights_from_distributed"):
            bucket: dict[str, Any] = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]]}
            await client.update_weights_from_distributed(UpdateWeightsFromDistributed(**bucket, group_name="gone"))
        assert all((await client.health()).values())
        await client.update_sessions.end()
        await client.destroy_weights_update_group("gone")

    run(router, inner)


def test_keys_work_and_are_on_no_command_line(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    args = with_keys(
        Args(
            hf_checkpoint=str(model_dirs["qwen3"]),
            rollout_engine="embedded",
            rollout_num_gpus=1,
            router={"control_plane_api_keys": ["me:Someone:admin:sesame:open"], "log_level": "debug"},
        )
    )
    keys = Keys.of(args)
    assert len({keys.engine, keys.router, keys.control}) == 3
    engine = launch_engine(args, index=0, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "engine.log")
    router = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=tmp_path / "router.log")
    for process in (engine, router):
        process.wait_ready(60)
    servers = [psutil.Process(process.pid) for process in (engine, router)]
    guards = [server.parent() for server in servers]
    lines = [" ".join(process.cmdline()) for process in (*servers, *guards) if process is not None]
    assert len(lines) == 4
    assert all("keyed" in line or "sglang::router" in line for line in lines), "the router names itself"
    for wrong in (NO_KEYS, Keys(control=keys.engine), Keys(control=keys.router)):
        with pytest.raises(RuntimeError, match=r"refused .*401.*--router-control-plane-api-keys"):
            register_worker(router.url, engine.url, keys=wrong)
    register_worker(router.url, engine.url, keys=keys)

    async def ask(keys: Keys, engines: list[str] | None = None) -> str:
        async with EngineClient(router.url, keys=keys, engines=engines) as client:
            response = await client.generate(request([1], max_new_tokens=2))
            return f"{response.finish_reason} {await client.weight_versions()}"

    assert asyncio.run(ask(keys)) == "length ['0']"
    assert asyncio.run(ask(replace(keys, control="sesame:open"))) == "length ['0']", "the key that the user gave"
    for wrong in (NO_KEYS, replace(keys, router=None), replace(keys, engine=None), replace(keys, router=keys.engine)):
        with pytest.raises(EngineError, match="401"):
            asyncio.run(ask(wrong, [engine.url]))
    secrets = {key for key in (keys.engine, keys.router, keys.control, "sesame") if key is not None}
    shown = " ".join(lines) + engine.log_path.read_text() + router.log_path.read_text()
    assert [secret for secret in secrets if secret in shown] == []
    router.stop()
    engine.stop()


def test_a_dead_engines_requests_go_elsewhere(router: ManagedProcess, engines: list[ForkedEngine]) -> None:
    """This is the last test, because it kills an engine."""

    async def ask(client: EngineClient) -> tuple[list[GenerateResponse], dict[str, bool]]:
        tasks = [asyncio.create_task(client.generate(request([i], max_new_tokens=200))) for i in range(8)]
        await asyncio.sleep(0.1)
        os.kill(engines[0].pid, signal.SIGKILL)
        return await asyncio.gather(*tasks), await client.health()

    responses, health = run(router, ask)
    assert [r.finish_reason for r in responses] == ["length"] * 8
    assert health == {engines[0].url: False, engines[1].url: True}
    deadline = time.monotonic() + 10
    while engines[0].alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engines[0].alive()


def test_torch_is_not_needed_by_the_client() -> None:
    """The modules that the rollout imports stay light."""
    import subprocess
    import sys

    code = "import sys, slime.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
