"""Mixtures of experts in the embedded engine: log-probs and routes against transformers, and errors."""

from __future__ import annotations

import asyncio
import base64
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_scheduler import Bench, make_bench, prompts, request
from test_server import call
from tiny_models import StartEngine

from slime.config.args import Args
from slime.engine.client import EngineClient, EngineError
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.fixed_shapes import SPARE_ROWS, FixedShapes, find_sizes
from slime.engine.embedded.mlp import Experts
from slime.engine.embedded.scheduler import Request
from slime.engine.external import check_model
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams

FAMILIES = ("qwen3_moe", "glm4_moe")
TOPK, LAYERS, DENSE = 3, 4, {"qwen3_moe": 0, "glm4_moe": 1}


def bench_of(path: Path, *, deterministic: bool = False) -> Bench:
    """A bench whose cache keeps routes."""
    bench = make_bench(path)
    model = bench.scheduler.model
    sizes = {"rows": 64, "tokens": 64 * 256, "spare_rows": SPARE_ROWS}
    bench.scheduler.cache = KVCache(model.architecture, dtype=model.dtype, keeps_routes=True, **sizes)
    if deterministic:
        bench.scheduler.fixed_shapes = FixedShapes(model, bench.scheduler.cache, find_sizes(model))
    return bench


def wishes() -> list[Request]:
    """Return prompts of all lengths, some of them twice, for responses of all lengths."""
    texts = prompts(6, seed=4)
    asked = [
        request(ids, seed=number, max_new_tokens=(3, 30, 17)[number % 3], temperature=0.8)
        for number, ids in enumerate([*texts, texts[2], texts[1]])
    ]
    for one in asked:
        one.return_routes = True
    return asked


def served(bench: Bench, *, together: bool) -> list[Request]:
    """Run `wishes` one by one, or with random arrival times, so that their rows are moved and copied."""
    asked, rng = wishes(), random.Random(0)
    for one in asked if not together else rng.sample(asked, len(asked)):
        bench.add(one)
        if not together:
            bench.run()
        for _ in range(rng.choice((0, 1, 5)) if together else 0):
            bench.step()
    bench.run()
    return asked


def routes_of(done: Request) -> np.ndarray:
    """Return [tokens - 1, layers with experts, topk], the experts of a token in ascending order."""
    assert done.routes is not None and done.routes.dtype == torch.int32
    return np.sort(done.routes.numpy(), axis=-1)


def hf_routes(model: Any, ids: list[int]) -> np.ndarray:
    """Return the same from transformers' own code, for all `ids`."""
    found: list[torch.Tensor] = []

    def before_mlp(module: Any, inputs: Any) -> None:  # glm4_moe chooses there
        logits = module.gate(inputs[0])
        found.append(module.route_tokens_to_experts(logits)[0])

    def after_gate(module: Any, inputs: Any, output: Any) -> None:  # qwen3_moe here
        found.append(output[2])

    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [
        mlp.register_forward_pre_hook(before_mlp)
        if hasattr(mlp, "route_tokens_to_experts")
        else mlp.gate.register_forward_hook(after_gate)
        for mlp in layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return np.sort(torch.stack(found, dim=1).numpy(), axis=-1)


@pytest.fixture(scope="module")
def hf_models(model_dirs: dict[str, Path]) -> dict[str, Any]:
    return {family: tiny_models.hf_model(model_dirs[family]) for family in FAMILIES}


def log_prob_error(hf: Any, done: Request) -> float:
    expected = tiny_models.hf_log_probs(hf, done.ids, 0.8)[len(done.input_ids) - 1 :]
    return max(abs(a - b) for a, b in zip(done.log_probs, expected, strict=True))


def check_against(hf: Any, family: str, asked: list[Request]) -> None:
    for done in asked:
        assert log_prob_error(hf, done) < 2e-5
        assert routes_of(done).shape == (len(done.ids) - 1, LAYERS - DENSE[family], TOPK)
        assert (routes_of(done) == hf_routes(hf, done.ids)[:-1]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_routes_are_transformers(
    family: str, model_dirs: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    check_against(hf_models[family], family, served(bench_of(model_dirs[family]), together=True))


CHANGES: dict[str, dict[str, Any]] = {
    "norm": {"norm_topk_prob": False},
    "scale": {"routed_scaling_factor": 1.0},
    "groups": {"router_groups": 1, "router_topk_groups": 1},
    "score": {"router_score": "softmax"},
}


@pytest.mark.parametrize("change", ["norm", "scale", "groups", "score", "bias", "shared"])
def test_control_every_part_of_the_router_matters(
    change: str, model_dirs: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    bench = bench_of(model_dirs["glm4_moe"])
    for i, layer in enumerate(bench.scheduler.model.layers):
        if isinstance(layer.mlp, Experts):
            arch = replace(layer.mlp.architecture, **CHANGES.get(change, {}))
            mlp = replace(layer.mlp, architecture=arch, **({change: None} if change not in CHANGES else {}))
            bench.scheduler.model.layers[i] = replace(layer, mlp=mlp)
    asked = wishes()[:3]
    for one in asked:
        bench.add(one)
    bench.run()
    assert max(log_prob_error(hf_models["glm4_moe"], done) for done in asked) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_requests_do_not_depend_on_others(
    family: str, model_dirs: dict[str, Path], hf_models: dict[str, Any]
) -> None:
    bench = bench_of(model_dirs[family], deterministic=True)
    alone, together = (served(bench, together=company) for company in (False, True))
    check_against(hf_models[family], family, together)
    for ours, theirs in zip(alone, together, strict=True):
        assert (ours.output_ids, ours.log_probs) == (theirs.output_ids, theirs.log_probs)
        assert (routes_of(ours) == routes_of(theirs)).all()


def test_control_the_default_path_depends_on_others(model_dirs: dict[str, Path]) -> None:
    bench = bench_of(model_dirs["qwen3_moe"])
    alone, together = (served(bench, together=company) for company in (False, True))
    assert any(ours.log_probs != theirs.log_probs for ours, theirs in zip(alone, together, strict=True))


def test_retracted_requests_keep_routes_and_get_new(model_dirs: dict[str, Path], hf_models: dict[str, Any]) -> None:
    bench = bench_of(model_dirs["glm4_moe"])
    aborted, finished, never = wishes()[:3]
    for one in (aborted, finished):
        one.params = SamplingParams(max_new_tokens=12)
        bench.add(one)
    for _ in range(4):
        bench.step()
    bench.scheduler.retract()
    bench.add(never)
    bench.scheduler.abort(lambda one: one is not finished)
    assert (routes_of(aborted) == hf_routes(hf_models["glm4_moe"], aborted.ids)[:-1]).all()
    assert never.routes is None and never.output_ids == []
    bench.weights.load(model_dirs["glm4_moe"], version="1")
    with torch.no_grad():
        for name, tensor in bench.scheduler.model.weights.items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(0, 1, len(tensor)))
    bench.run()
    assert len(routes_of(finished)) == len(finished.ids) - 1
    # All routes are those of the new weights, including the old part.
    before = hf_routes(hf_models["glm4_moe"], finished.ids)[:5]
    assert (routes_of(finished)[:5] != before).any()


def test_experts_sleep_wake_and_are_sent_by_name(model_dirs: dict[str, Path]) -> None:
    bench = bench_of(model_dirs["glm4_moe"])
    weights, model = bench.weights, bench.scheduler.model
    before = weights.checksum()
    sent = {name: tensor.clone() for name, tensor in model.weights.items()}
    weights.release()
    mlp = model.layers[-1].mlp
    assert isinstance(mlp, Experts)
    for tensor in (mlp.gate_up, mlp.down, mlp.router, mlp.bias):
        assert tensor is not None and tensor.untyped_storage().nbytes() == 0
    weights.take_memory()
    for name in sorted(sent, reverse=True):
        assert bench.weights.complete is False
        weights.write_bucket([name], [sent[name]], version="2" if name == min(sent) else None, flush=True)
    assert weights.checksum() == before
    last = "model.layers.3.mlp.experts.7.up_proj.weight"
    weights.write_bucket([last], [sent[last] + 1], version=None, flush=True)
    assert weights.checksum() != before
    assert (mlp.gate_up[7, 32:] == sent[last] + 1).all()


# ---- over HTTP


def test_an_answer_is_sglangs(
    model_dirs: dict[str, Path], start_engine: StartEngine, hf_models: dict[str, Any]
) -> None:
    engine = start_engine(model_dirs["glm4_moe"], "--enable-return-routed-experts")
    body = {"input_ids": [1, 40, 50, 3], "sampling_params": {"max_new_tokens": 6}, "return_routed_experts": True}
    status, answer = call(engine.url + "/generate", body)
    assert status == 200
    raw = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), dtype=np.int32)
    routes = raw.reshape(9, LAYERS, TOPK)
    assert (routes[:, 0] == 0).all(), "SGLang counts the dense layer, and writes nothing there"
    expected = hf_routes(hf_models["glm4_moe"], [*body["input_ids"], *answer["output_ids"]])[:-1]
    assert (np.sort(routes[:, 1:], axis=-1) == expected).all()
    # the same with fewer tokens
    prompt = [*body["input_ids"], *answer["output_ids"][:-1]]
    further = {**body, "input_ids": prompt, "routed_experts_start_len": 7, "sampling_params": {"max_new_tokens": 1}}
    status, answer = call(engine.url + "/generate", further)
    assert answer["meta_info"]["routed_experts"] == base64.b64encode(routes[7:].tobytes()).decode()
    status, answer = call(engine.url + "/generate", {**body, "routed_experts_start_len": 5})
    assert status == 400 and "routed_experts_start_len is 5" in answer["message"]
    status, answer = call(engine.url + "/generate", {**body, "return_routed_experts": False})
    assert "routed_experts" not in answer["meta_info"]
    _asked_through_the_client(engine.url)


def _asked_through_the_client(url: str) -> None:
    """The router, which would lose the field, is not used: there is none at this address."""
    asked = GenerateRequest(
        input_ids=[1, 2, 3], sampling_params=SamplingParams(max_new_tokens=4), return_routed_experts=True
    )

    async def ask() -> tuple[GenerateResponse, list[Any]]:
        async with EngineClient("http://127.0.0.1:9", engines=[url]) as client:
            return await client.generate(asked), await client.describe()

    response, [info] = asyncio.run(ask())
    assert response.routed_experts is not None and response.routed_experts.size == 6 * LAYERS * TOPK
    check_model(Args(use_routing_replay=True, rollout_external_engines=(url,)), url, info)
    with pytest.raises(ValueError, match="start it with --enable-return-routed-experts"):
        check_model(Args(use_routing_replay=True), url, replace(info, returns_routed_experts=False))


def test_an_engine_without_routes_refuses_to_return_them(glm4_engine: Any) -> None:
    asked = GenerateRequest(input_ids=[1, 2, 3], return_routed_experts=True)

    async def ask() -> None:
        async with EngineClient("http://127.0.0.1:9", engines=[glm4_engine.url]) as client:
            await client.generate(asked)

    with pytest.raises(EngineError, match="start it with --enable-return-routed-experts"):
        asyncio.run(ask())


def test_a_dense_model_returns_no_experts(model_dirs: dict[str, Path]) -> None:
    from slime.engine.embedded.settings import parse_settings

    words = ["--model-path", str(model_dirs["glm4"]), "--port", "1", "--enable-return-routed-experts"]
    with pytest.raises(ValueError, match=r"--enable-return-routed-experts: the glm4 model at .* has no experts"):
        parse_settings(words)
