"""Weights change under requests in flight: which weights sampled which tokens, for each --update-weight-pause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slime.core.pausing import PauseChoice
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient, EngineError
from slime.engine.protocol import Endpoint, GenerateRequest, GenerateResponse, SamplingParams
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.models.hf_files import HFReader
from slime.sync.broadcast import BroadcastTransport
from tests.engine.tiny_models import make_model
from tests.sync.served import serving

PROMPTS = [[5, 9, 30], [7, 8], [40, 41, 42, 43]]
RESPONSE, LONG = 150, 450


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, "glm4", seed=seed) for seed, name in enumerate(("old", "new"))}


@pytest.fixture(scope="module")
def engine(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ManagedProcess]:
    with serving(models["old"], tmp_path_factory.mktemp("logs"), engines=1, router=False) as processes:
        yield processes[0]


def weights(model: Path) -> list[NamedTensor]:
    reader = HFReader(model)
    return [(name, reader.get(name)) for name in reader.names()]


def connected(engine: ManagedProcess, pause: PauseChoice, drain_within: float = 60) -> BroadcastTransport:
    return BroadcastTransport(
        EngineClient(engine.url, engines=[engine.url]),
        engine_ranks=[1],
        address="127.0.0.1",
        port=find_free_port(),
        backend="gloo",
        bucket_bytes=50_000,
        pause=pause,
        drain_within=drain_within,
    )


def ask(engine: ManagedProcess, requests: list[GenerateRequest]) -> list[GenerateResponse]:
    async def all_at_once() -> list[GenerateResponse]:
        async with EngineClient(engine.url, engines=[engine.url], request_timeout=60) as client:
            return list(await asyncio.gather(*map(client.generate, requests)))

    return asyncio.run(all_at_once())


def num_running(engine: ManagedProcess) -> int:
    async def running() -> int:
        async with EngineClient(engine.url, engines=[engine.url]) as client:
            [info] = await client._everywhere(Endpoint.SERVER_INFO, None)
            return info["num_running_requests"]

    return asyncio.run(running())


def during_requests(
    engine: ManagedProcess, action: Callable[[], object], *, tokens: int = RESPONSE
) -> list[GenerateResponse]:
    """Return the answers to requests that were all running when `action` began."""
    requests = [
        GenerateRequest(
            input_ids=prompt, sampling_params=SamplingParams(max_new_tokens=tokens, ignore_eos=True, sampling_seed=3)
        )
        for prompt in PROMPTS
    ]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask, engine, requests)
        deadline = time.monotonic() + 30
        while num_running(engine) < len(PROMPTS):
            assert time.monotonic() < deadline
            if answers.done():  # this process had no turn while they were running
                answers = pool.submit(ask, engine, requests)
            time.sleep(0.002)
        action()
        return answers.result()


def rescored(engine: ManagedProcess, answers: list[GenerateResponse]) -> list[torch.Tensor]:
    """Return the log-probs that the engine's present weights give to the same tokens."""
    requests = [
        GenerateRequest(
            input_ids=prompt + answer.output_ids,
            sampling_params=SamplingParams(max_new_tokens=0),
            logprob_start_len=len(prompt) - 1,  # the first entry is None
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    return [torch.tensor(answer.input_log_probs[1:]) for answer in ask(engine, requests)]


def of_old_and_new(
    engine: ManagedProcess, models: dict[str, Path], pause: PauseChoice
) -> list[tuple[GenerateResponse, torch.Tensor, torch.Tensor]]:
    """Return each answer, and for each token whether its log-prob is that of the old weights, and of the new ones."""
    transport = connected(engine, pause)
    transport.send(weights(models["old"]), version=1)
    answers = during_requests(engine, lambda: transport.send(weights(models["new"]), version=2))
    new = rescored(engine, answers)
    assert transport.versions() == {engine.url: "2"}
    transport.send(weights(models["old"]), version=3)
    old = rescored(engine, answers)
    transport.close()

    def same(log_probs: torch.Tensor, answer: GenerateResponse) -> torch.Tensor:
        return (log_probs - torch.tensor(answer.log_probs)).abs() < 1e-4

    return [(a, same(o, a), same(n, a)) for a, o, n in zip(answers, old, new, strict=True)]


def test_drained_answers_are_of_the_old_weights(engine: ManagedProcess, models: dict[str, Path]) -> None:
    for answer, old, new in of_old_and_new(engine, models, "drain"):
        assert (answer.finish_reason, answer.weight_version, len(answer.output_ids)) == ("length", "1", RESPONSE)
        assert old.all() and new.float().mean() < 0.1


def test_aborted_answers_are_of_the_old_weights(engine: ManagedProcess, models: dict[str, Path]) -> None:
    for answer, old, _ in of_old_and_new(engine, models, "abort"):
        assert (answer.finish_reason, answer.weight_version) == ("abort", "1")
        assert 0 < len(answer.output_ids) < RESPONSE and old.all()


@pytest.mark.parametrize("pause", ["in_place", "retract"])
def test_paused_answers_continue_with_new_weights(
    engine: ManagedProcess, models: dict[str, Path], pause: PauseChoice
) -> None:
    for answer, old, new in of_old_and_new(engine, models, pause):
        assert (answer.finish_reason, answer.weight_version, len(answer.output_ids)) == ("length", "2", RESPONSE)
        first = int(old.long().cumprod(0).sum())
        assert 0 < first < RESPONSE and old[first:].float().mean() < 0.1
        if pause == "retract":  # prefilled again; with in_place they continue on the KV cache of the old weights
            assert new[first:].all()
        else:
            assert new[first:].float().mean() < 0.5


def test_a_drain_waits_while_tokens_are_made(engine: ManagedProcess, models: dict[str, Path]) -> None:
    """The limit is on the time without progress: the responses take longer than it."""
    limit = 0.4
    transport = connected(engine, "drain", drain_within=limit)
    waited: list[float] = []
    send = lambda: waited.append(transport.send(weights(models["old"]), version=4).waited)  # noqa: E731
    answers = during_requests(engine, send, tokens=LONG)
    assert [len(answer.output_ids) for answer in answers] == [LONG] * len(PROMPTS)
    assert waited[0] > limit, f"control: they did, {waited}"
    transport.close()


def test_an_endless_drain_is_an_error(engine: ManagedProcess, models: dict[str, Path]) -> None:
    transport = connected(engine, "drain", drain_within=0.0)

    def refused() -> None:
        with pytest.raises(RuntimeError, match="--update-weight-pause drain"):
            transport.send(weights(models["new"]), version=4)

    assert all(answer.finish_reason == "length" for answer in during_requests(engine, refused))
    transport.close()


@pytest.mark.parametrize("pause", ["drain", "retract"])
def test_a_failed_sync_leaves_no_engine_paused(
    engine: ManagedProcess, models: dict[str, Path], pause: PauseChoice
) -> None:
    transport = connected(engine, pause)

    def failing() -> Iterator[NamedTensor]:
        yield weights(models["new"])[0]
        raise OSError("a trainer is gone")

    with pytest.raises(OSError, match="a trainer is gone"):
        transport.send(failing(), version=5)
    with pytest.raises(EngineError, match="has no tensor"):
        transport.send([("no.such", torch.zeros(2))], version=5)
    [answer] = ask(engine, [GenerateRequest(input_ids=[5], sampling_params=SamplingParams(max_new_tokens=2))])
    assert len(answer.output_ids) == 2 and answer.weight_version != "5"
    transport.close()
