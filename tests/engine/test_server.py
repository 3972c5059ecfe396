"""One real engine process over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import engine_faults_for_tests
import pytest
import tiny_models
from tiny_models import StartEngine

from tests.forked_engine import ForkedEngine


def call(url: str, body: Any = None, *, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """POST (GET without a body); return status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def generate(engine: ForkedEngine, ids: list[int], **fields: Any) -> dict[str, Any]:
    top = {k: fields.pop(k) for k in ("rid", "return_logprob", "logprob_start_len", "text") if k in fields}
    status, answer = call(engine.url + "/generate", {"input_ids": ids, "sampling_params": fields, **top})
    assert status == 200, answer
    return answer


async def start_generation(engine: ForkedEngine, ids: list[int], **fields: Any) -> asyncio.Task[dict[str, Any]]:
    """Start a generation; return once the engine has begun it."""
    task = asyncio.create_task(asyncio.to_thread(generate, engine, ids, **fields))
    for _ in range(500):
        info = (await asyncio.to_thread(call, engine.url + "/server_info"))[1]
        if info["num_running_requests"]:
            break
        await asyncio.sleep(0.01)
    return task


def test_an_answer_is_sglangs(glm4_engine: ForkedEngine, model_dirs: dict[str, Path]) -> None:
    ids = [1, 40, 50]
    answer = generate(
        glm4_engine, ids, max_new_tokens=12, temperature=0.8, rid="one", return_logprob=True, logprob_start_len=0
    )
    meta = answer["meta_info"]
    assert meta["id"] == "one"
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (3, 12, "0")
    assert {"cached_tokens", "e2e_latency"} <= set(meta)
    outputs = meta["output_token_logprobs"]
    assert [entry[1:] for entry in outputs] == [[t, None] for t in answer["output_ids"]]
    inputs = meta["input_token_logprobs"]
    assert inputs[0] == [None, 1, None]
    hf = tiny_models.hf_model(model_dirs["glm4"])
    want = tiny_models.hf_log_probs(hf, ids, 1.0) + tiny_models.hf_log_probs(hf, ids + answer["output_ids"], 0.8)[2:]
    got = [entry[0] for entry in inputs[1:] + outputs]
    assert max(abs(a - b) for a, b in zip(want, got, strict=True)) <= 1e-5
    # SGLang's default: no log-probs unless requested.
    assert "output_token_logprobs" not in generate(glm4_engine, ids, max_new_tokens=1)["meta_info"]


def test_responses_repeat_only_with_a_seed(glm4_engine: ForkedEngine) -> None:
    seeded = [generate(glm4_engine, [1, 2], max_new_tokens=20, sampling_seed=s)["output_ids"] for s in (5, 5, 6)]
    assert seeded[0] == seeded[1] != seeded[2]
    free = [generate(glm4_engine, [1, 2], max_new_tokens=20)["output_ids"] for _ in range(2)]
    assert free[0] != free[1]


def test_stops(model_dirs: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(model_dirs["glm4-eos"])  # its config.json names 7 and 9
    same = {"max_new_tokens": 300, "sampling_seed": 3}
    free = generate(engine, [1, 2], ignore_eos=True, **same)
    assert free["meta_info"]["finish_reason"]["type"] == "length"
    ids, text = free["output_ids"], free["text"]
    assert 100 < len(text) < 300, "a character a token, but not all of the ids are tokens"
    ended = generate(engine, [1, 2], **same)
    first = min(ids.index(t) for t in (7, 9) if t in ids)
    assert ended["output_ids"] == ids[: first + 1]
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[first]}
    own = next(t for t in ids[first // 2 :] if t not in (7, 9))
    by_id = generate(engine, [1, 2], stop_token_ids=[own], **same)
    assert by_id["output_ids"] == ids[: ids.index(own) + 1]
    assert generate(engine, [1, 2], ignore_eos=True, stop_token_ids=[own], **same)["output_ids"] == ids
    stop = text[30:33]
    by_text = generate(engine, [1, 2], ignore_eos=True, stop=["no such text", stop], **same)
    assert by_text["text"] == text[: text.index(stop)]
    assert by_text["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = generate(engine, [1, 2], ignore_eos=True, stop=stop, no_stop_trim=True, **same)
    assert kept["text"] == text[: text.index(stop) + len(stop)]
    engine.stop()


def test_an_engine_with_a_tokenizer_takes_text(glm4_engine: ForkedEngine) -> None:
    body = {"text": "1+1=", "sampling_params": {"max_new_tokens": 0}}
    status, answer = call(glm4_engine.url + "/generate", body)
    assert (status, answer["meta_info"]["prompt_tokens"]) == (200, 4)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": list(range(100)) * 6}, "longer than the model's context length (512 tokens)"),
        ({"input_ids": [1] * 500, "sampling_params": {"max_new_tokens": 13}}, "512 tokens: 500 input tokens and 13"),
        ({"input_ids": [1, 128]}, "[0, 128)"),
        ({"input_ids": [1], "colour": 3}, "no field colour"),
        ({"input_ids": [1], "stream": True}, "stream is True"),
        ({"input_ids": [1], "sampling_params": {"temprature": 1}}, "temprature"),
        ({}, "input_ids"),
        ([], "JSON object"),
    ],
)
def test_a_bad_request_gets_the_reason(glm4_engine: ForkedEngine, body: Any, words: str) -> None:
    status, answer = call(glm4_engine.url + "/generate", body)
    assert status == 400
    assert words in answer["error"]["message"]


def test_a_body_without_json_is_refused(glm4_engine: ForkedEngine) -> None:
    request = urllib.request.Request(glm4_engine.url + "/generate", b"\x80\x04pickle")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


def test_an_abort_answers_with_partial_output(glm4_engine: ForkedEngine) -> None:
    async def run() -> list[dict[str, Any]]:
        tasks = [
            await start_generation(glm4_engine, [1, 2, i], max_new_tokens=500, rid=f"a{i}", return_logprob=True)
            for i in (3, 4)
        ]
        assert (await asyncio.to_thread(call, glm4_engine.url + "/abort_request", {"rid": "a3"}))[0] == 200
        first = await tasks[0]
        assert not tasks[1].done()
        await asyncio.to_thread(call, glm4_engine.url + "/abort_request", {"abort_all": True})
        return [first, await tasks[1]]

    for answer in asyncio.run(run()):
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert 0 < meta["completion_tokens"] < 500
        assert len(meta["output_token_logprobs"]) == len(answer["output_ids"]) == meta["completion_tokens"]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_stops_everything_and_changes_nothing(glm4_engine: ForkedEngine, mode: str) -> None:
    fields = {"max_new_tokens": 400, "sampling_seed": 11}
    expected = generate(glm4_engine, [1, 2, 3], **fields)["output_ids"]

    async def run() -> dict[str, Any]:
        task = await start_generation(glm4_engine, [1, 2, 3], **fields)
        post = lambda path, body: asyncio.to_thread(call, glm4_engine.url + path, body)  # noqa: E731
        await post("/pause_generation", {"mode": mode})
        # A paused engine accepts requests but answers none; flushing follows SGLang.
        late = asyncio.create_task(asyncio.to_thread(generate, glm4_engine, [7], max_new_tokens=1))
        await asyncio.sleep(0.5)
        assert not task.done()
        assert not late.done()
        assert (await post("/flush_cache", {}))[0] == (400 if mode == "in_place" else 200)
        assert (await post("/continue_generation", {}))[0] == 200
        await late
        return await task

    answer = asyncio.run(run())
    assert answer["output_ids"] == expected
    assert answer["meta_info"]["finish_reason"]["type"] == "length"


def test_a_lost_client_aborts_its_request(glm4_engine: ForkedEngine) -> None:
    body = json.dumps({"input_ids": [1], "sampling_params": {"max_new_tokens": 500}}).encode()
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(urllib.request.Request(glm4_engine.url + "/generate", body), timeout=0.05)
    deadline = time.monotonic() + 20
    while call(glm4_engine.url + "/server_info")[1]["num_running_requests"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert call(glm4_engine.url + "/server_info")[1]["num_running_requests"] == 0


def test_the_api_key_guards_all_but_health(model_dirs: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(model_dirs["qwen3"], "--api-key", "sesame")  # ready: health needs no key
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \xe9"}):
        status, answer = call(engine.url + "/model_info", headers=headers)
        assert (status, "API key" in answer["message"]) == (401, True)
    assert call(engine.url + "/model_info", headers={"Authorization": "Bearer sesame"})[0] == 200
    engine.stop()


def test_a_failed_scheduler_ends_the_process(model_dirs: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(model_dirs["qwen3"], prepare=engine_faults_for_tests.fail_in_the_third_step)
    status, answer = call(engine.url + "/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 50}})
    assert status == 500
    assert "planted fault" in answer["message"]
    deadline = time.monotonic() + 30
    while engine.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine.alive()
    assert "planted fault" in engine.log_path.read_text()


def test_a_signal_ends_an_engine_at_work(model_dirs: dict[str, Path], start_engine: StartEngine) -> None:
    engine = start_engine(model_dirs["qwen3"])

    async def run() -> None:
        task = await start_generation(engine, [1], max_new_tokens=500)
        await asyncio.to_thread(call, engine.url + "/pause_generation", {"mode": "in_place"})
        os.kill(engine.pid, signal.SIGTERM)
        for _ in range(200):
            if not engine.alive():
                break
            await asyncio.sleep(0.05)
        assert not engine.alive()
        with pytest.raises((OSError, AssertionError)):
            await task

    asyncio.run(run())
