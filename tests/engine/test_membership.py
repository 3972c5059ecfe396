"""A router that runs already: a run's engines come and go, and others' are never used. This runs on a real router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from recording_engine import recording_engine
from tiny_models import StartEngine

from slime.config.args import Args
from slime.engine.client import EngineError
from slime.engine.external import find_engines
from slime.engine.keys import NO_KEYS, Keys
from slime.engine.launch import launch_router
from slime.engine.membership import LABEL, Member, Membership, external_router_url, register_worker
from slime.engine.server_process import ManagedProcess, ask, find_free_port
from tests.forked_engine import ForkedEngine


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedProcess]:
    log = tmp_path_factory.mktemp("router") / "router.log"
    quick = {"health_check_interval_secs": 1, "health_failure_threshold": 1}
    process = launch_router(Args(router=quick), host="127.0.0.1", port=find_free_port(), log_path=log)
    process.wait_ready(60)
    yield process
    process.stop()


def test_a_router_without_keys_is_open(router: ManagedProcess) -> None:
    assert Membership(router.url).is_open()


def listed(router: ManagedProcess) -> dict[str, bool]:
    return {worker["url"]: worker["is_healthy"] for worker in ask(router.url, "GET")[1]["workers"]}


def test_engines_that_joined_leave_and_no_others(
    router: ManagedProcess, glm4_engine: ForkedEngine, start_engine: StartEngine, model_dirs: dict[str, Path]
) -> None:
    """Engines of others are refused, except those of a killed run that are dead."""
    other = start_engine(model_dirs["glm4"])
    register_worker(router.url, glm4_engine.url)
    run = Membership(router.url)
    with pytest.raises(RuntimeError, match=f"not this run's: {glm4_engine.url};.*--rollout-external-engines"):
        run.join([other.url])
    assert listed(router) == {glm4_engine.url: True}
    run.join([glm4_engine.url, other.url])
    assert listed(router) == {glm4_engine.url: True, other.url: True}
    run.leave()
    assert listed(router) == {glm4_engine.url: True}

    Membership(router.url).join([glm4_engine.url, other.url])  # a run that is killed
    with pytest.raises(RuntimeError, match=f"{other.url};"):
        Membership(router.url).refuse_others([glm4_engine.url])  # its engine is alive: its run may continue
    other.stop()
    deadline = time.monotonic() + 20
    while listed(router)[other.url]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    Membership(router.url).refuse_others([glm4_engine.url])
    assert listed(router) == {glm4_engine.url: True}


def test_keys_of_a_killed_run_are_replaced(router: ManagedProcess) -> None:
    """The router keeps the key with which an engine was first registered; a new run's engine may have its address."""
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    with recording_engine() as engine:
        for key in ("old", "new"):
            run = Membership(router.url, keys=Keys(engine=key))
            run.join([*{*listed(router), engine.url}])
            for _ in range(2 * len(listed(router))):
                assert ask(router.url, "POST", body, path="/generate", api_key="of the router")[0] == 200
            assert engine.generations()[-1] == f"Bearer {key}", "the router sends the engine's key, not its own"
        run.remove(engine.url)


def test_a_router_with_a_key_refuses_strangers(tmp_path: Path) -> None:
    keys = ("me:Me:user:for-reading", "run:Run:admin:for-changing")
    args = Args(router={"control_plane_api_keys": keys})
    port = find_free_port()
    router = launch_router(args, host="127.0.0.1", port=port, log_path=tmp_path / "log")
    router.wait_ready(60)
    joined = Membership(router.url, keys=Keys.of(replace(args, sglang_router_ip="127.0.0.1", sglang_router_port=port)))
    assert not joined.is_open()
    with recording_engine() as engine:
        for wrong in (NO_KEYS, Keys(control="for-reading"), Keys(control="none")):
            with pytest.raises(RuntimeError, match=r"40[13]\).*give the run an admin key of that router"):
                Membership(router.url, keys=wrong).join([engine.url])
        joined.join([engine.url])
        assert engine.asked
        assert set(engine.asked) <= {(path, None) for path, _ in engine.asked}, "it never sees the router's key"
        joined.leave()
    router.stop()


def test_only_a_runs_dead_engine_is_removed(glm4_engine: ForkedEngine) -> None:
    """A user's engine may come back, and so may an engine that only this run can reach."""
    dead = f"http://127.0.0.1:{find_free_port()}"
    assert Member("1", dead, False, {LABEL: "1"}).is_left_over()
    assert not Member("1", dead, False, {}).is_left_over()
    assert not Member("1", dead, True, {LABEL: "1"}).is_left_over()
    assert not Member("1", glm4_engine.url, False, {LABEL: "1"}).is_left_over()


def test_a_router_is_no_engine(router: ManagedProcess) -> None:
    """It also answers that it is healthy."""
    with pytest.raises(EngineError, match=router.url):
        asyncio.run(find_engines(Args(rollout_external_engines=(router.url,)), say=print))


def test_a_router_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{find_free_port()}"
    with pytest.raises(RuntimeError, match=f"{url} did not answer within 0.3 s.*--sglang-router-port"):
        Membership(url, timeout=0.3).wait_ready()


def test_the_url_of_an_external_router() -> None:
    assert external_router_url(Args()) is None
    assert external_router_url(Args(sglang_router_ip="10.0.0.1", sglang_router_port=80)) == "http://10.0.0.1:80"
    assert external_router_url(Args(sglang_router_ip="::1", sglang_router_port=80)) == "http://[::1]:80"
