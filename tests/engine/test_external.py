"""External engines: only those that serve the model are taken, and they are left usable."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import StartEngine

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.args import Args
from slime.engine.client import EngineClient, EngineError
from slime.engine.engine_info import EngineInfo
from slime.engine.external import FoundEngines, check_model, find_engines, free_engines
from slime.engine.protocol import WEIGHT_GROUP, GenerateRequest, SamplingParams
from slime.engine.server_process import find_free_port
from slime.engine.weight_group import join_weight_group
from tests.forked_engine import ForkedEngine


def found(urls: list[str], model: Path, **flags: Any) -> FoundEngines:
    given: dict[str, Any] = {"bf16": False, "engine_start_timeout": 0.5, **flags}
    arch = hf_architecture(read_hf_config(model))
    args = Args(rollout_external_engines=tuple(urls), hf_checkpoint=str(model), architecture=arch, **given)
    return asyncio.run(find_engines(args, say=messages.append))


messages: list[str] = []


def test_engines_of_the_model_are_taken(glm4_engine: ForkedEngine, model_dirs: dict[str, Path]) -> None:
    assert found([glm4_engine.url], model_dirs["glm4"]) == FoundEngines((glm4_engine.url,), (1,))


def test_another_model_is_refused_with_the_differences(
    glm4_engine: ForkedEngine, start_engine: StartEngine, model_dirs: dict[str, Path]
) -> None:
    engine = start_engine(model_dirs["qwen3"])
    with pytest.raises(ValueError, match="family qwen3 there and glm4 here") as caught:
        found([glm4_engine.url, engine.url], model_dirs["glm4"])
    assert all(str(part) in str(caught.value) for part in (engine.url, model_dirs["qwen3"], model_dirs["glm4"]))
    engine.stop()
    arch = replace(hf_architecture(read_hf_config(model_dirs["glm4"])), vocab_size=130)
    args = Args(rollout_external_engines=(glm4_engine.url,), architecture=arch)
    with pytest.raises(ValueError, match="vocab_size 128 there and 130 here"):
        asyncio.run(find_engines(args, say=messages.append))


def test_an_engine_that_is_not_there_is_named(glm4_engine: ForkedEngine, model_dirs: dict[str, Path]) -> None:
    url = f"http://127.0.0.1:{find_free_port()}"
    with pytest.raises(EngineError, match=rf"{url} did not answer: not healthy within --engine-start-timeout 0\.5 s"):
        found([glm4_engine.url, url], model_dirs["glm4"])
    assert messages == [f"waiting for the engine {url}, up to 0.5 s (--engine-start-timeout)"]


def test_possible_mistakes_are_warnings(start_engine: StartEngine, model_dirs: dict[str, Path]) -> None:
    engine = start_engine(model_dirs["glm4"], "--context-length", "100", "--weight-version", "7")
    [context] = found([engine.url], model_dirs["glm4"]).warnings
    assert "its context is 100 tokens" in context
    assert "--rollout-max-context-len 94" in context
    assert found([engine.url], model_dirs["glm4"], rollout_max_context_len=95).warnings, "it refuses an input of 94"
    assert found([engine.url], model_dirs["glm4"], rollout_max_context_len=94).warnings == ()
    [old, dtype, _] = found([engine.url], model_dirs["glm4"], bf16=True, debug_rollout_only=True).warnings
    assert "weights of version 7" in old
    assert "computes in float32, the trainer in bfloat16" in dtype
    engine.stop()


def test_sglangs_report_is_read() -> None:
    """Fields of /server_info and /model_info as SGLang 0.5.21 names them."""
    server = {"model_path": "/m", "tp_size": 4, "dtype": "auto", "context_length": None, "version": "0.5.21"}
    model = {
        "model_path": "/m",
        "weight_version": "default",
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
    }
    info = EngineInfo.from_json(server, model)
    assert (info.num_ranks, info.dtype, info.context_length, info.model_type) == (4, None, None, "glm4")
    assert (info.weight_version, info.architecture) == ("default", None)


def test_an_engine_with_half_the_weights_is_refused() -> None:
    info = EngineInfo.from_json(
        {"tp_size": 1, "weights_complete": False}, {"model_path": "/m", "weight_version": "default"}
    )
    with pytest.raises(ValueError, match="http://e:1: it waits for the rest of a set of weights"):
        check_model(Args(debug_rollout_only=True), "http://e:1", info)
    check_model(Args(), "http://e:1", info)  # allowed: the first sync sends a whole set


def test_engines_are_left_usable(glm4_engine: ForkedEngine) -> None:
    """The engine is paused during a request and a weight update, in a weight group whose other end is gone."""
    params = SamplingParams(max_new_tokens=400, ignore_eos=True)

    async def inner() -> list[str]:
        async with EngineClient(glm4_engine.url, engines=[glm4_engine.url]) as client:
            port = find_free_port()
            joining = asyncio.to_thread(
                join_weight_group, "127.0.0.1", port, 0, 2, WEIGHT_GROUP, "gloo", True, timeout=60
            )
            group, _ = await asyncio.gather(
                joining, client.init_weights_update_group("127.0.0.1", port, 2, WEIGHT_GROUP, "gloo")
            )
            group.close()
            await client.update_sessions.begin()
            await client.pause("in_place")
            stuck = asyncio.create_task(client.generate(GenerateRequest(input_ids=[1], sampling_params=params)))
            await asyncio.sleep(0.2)
            assert not stuck.done()
            await free_engines(client)
            first = await stuck
            second = await client.generate(
                GenerateRequest(input_ids=[1], sampling_params=replace(params, max_new_tokens=2))
            )
            with pytest.raises(EngineError, match="400: no weight-update session is open"):
                await client.update_sessions.end()
            with pytest.raises(EngineError, match="there is no weight group"):
                await client.destroy_weights_update_group(WEIGHT_GROUP)
            return [first.finish_reason, second.finish_reason]

    assert asyncio.run(inner()) == ["abort", "length"]
