"""The embedded engine answers as SGLang does, by the table of its answers, or refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from sglang_answers import COUNT, INPUT_LOG_PROBS, NEW, OLD, ROWS, STOP, TEXT, Answer
from test_server import call, generate, start_generation

from tests.forked_engine import ForkedEngine

SEED = 3
INPUT = [1, 40, 50]


@pytest.fixture(scope="module")
def sampled(glm4_engine: ForkedEngine) -> dict[str, Any]:
    """Return the values of the table's names."""
    ids = generate(glm4_engine, INPUT, max_new_tokens=40, sampling_seed=SEED)["output_ids"]
    with_text = range(len(tiny_models.SPECIALS), len(tiny_models.VOCABULARY))
    place = next(i for i in range(5, 40) if ids[i] in with_text and ids[i] not in ids[:i])
    return {STOP: ids[place], TEXT: tiny_models.VOCABULARY[ids[place]], COUNT: place + 1}


def resolve(value: Any, sampled: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {name: resolve(inner, sampled) for name, inner in value.items()}
    if isinstance(value, list):
        return [resolve(inner, sampled) for inner in value]
    return sampled.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("name", ROWS)
def test_an_answer_is_that_of_the_table(glm4_engine: ForkedEngine, sampled: dict[str, Any], name: str) -> None:
    row = ROWS[name]
    ids = (INPUT * 200)[: row.length]
    body = {"input_ids": ids, "sampling_params": {"sampling_seed": SEED, **row.params}, **row.fields}
    status, answer = call(glm4_engine.url + "/generate", resolve(body, sampled))
    expected = Answer(400) if row.embedded == "refused" else row.answers[row.embedded]
    assert expected is not None
    assert status == expected.status, answer
    if status == 400:
        assert expected.word in answer["error"]["message"]
        return
    reason = answer["meta_info"]["finish_reason"]
    tokens = resolve(expected.tokens, sampled)
    assert (reason["type"], len(answer["output_ids"])) == (expected.reason, tokens)
    assert reason.get("matched") == resolve(expected.matched, sampled)
    if reason["type"] == "length":
        assert reason["length"] == tokens
    for version in (OLD, NEW):
        other = row.answers[version]
        if row.embedded != version and other is not None and other != expected:  # control: the versions differ
            found = (status, reason["type"], len(answer["output_ids"]))
            assert found != (other.status, other.reason, resolve(other.tokens, sampled))


@pytest.mark.parametrize("start", INPUT_LOG_PROBS)
def test_log_probs_of_the_input_are_raw(glm4_engine: ForkedEngine, model_dirs: dict[str, Path], start: int) -> None:
    answer = generate(
        glm4_engine, INPUT, max_new_tokens=1, temperature=0.5, return_logprob=True, logprob_start_len=start
    )
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in entries] == INPUT_LOG_PROBS[start]
    if len(entries) > 1:
        want = tiny_models.hf_log_probs(tiny_models.hf_model(model_dirs["glm4"]), INPUT, 1.0)
        assert entries[0][0] is None
        assert [value for value, _, _ in entries[1:]] == pytest.approx(want[start:], abs=1e-5)


def test_tiny_temperatures_are_greedy_with_raw_log_probs(
    glm4_engine: ForkedEngine, model_dirs: dict[str, Path]
) -> None:
    """Below 1e-6 (sampling_params: _SAMPLING_EPS); from there on the log-probs are of logits / temperature."""
    hf = tiny_models.hf_model(model_dirs["glm4"])
    found: dict[float, list[float]] = {}
    for temperature in (0.0, 9e-7, 1e-6):
        answer = generate(glm4_engine, INPUT, max_new_tokens=6, temperature=temperature, return_logprob=True)
        found[temperature] = [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert found[0.0] == found[9e-7]
    assert found[0.0] == pytest.approx(tiny_models.hf_log_probs(hf, INPUT + answer["output_ids"], 1.0)[2:], abs=1e-5)
    assert found[1e-6] == [0.0] * 6


def test_an_abort_matches_prefixes_of_used_names(glm4_engine: ForkedEngine) -> None:
    """`abort_request` of SGLang's tokenizer_manager and scheduler; a running request ends with one more token."""

    async def post(path: str, body: Any) -> dict[str, Any]:
        status, answer = await asyncio.to_thread(call, glm4_engine.url + path, body)
        assert status == 200, answer
        return answer

    async def run() -> None:
        running = await start_generation(glm4_engine, [1, 2], max_new_tokens=450, rid="run", return_logprob=True)
        await post("/pause_generation", {"mode": "in_place"})
        waiting = {
            rid: asyncio.create_task(asyncio.to_thread(generate, glm4_engine, [1, 2], max_new_tokens=2, rid=rid))
            for rid in ("ab", "abc", "b")
        }
        for _ in range(500):
            if (await asyncio.to_thread(call, glm4_engine.url + "/server_info"))[1]["num_waiting_requests"] == 3:
                break
            await asyncio.sleep(0.01)
        again = await asyncio.to_thread(call, glm4_engine.url + "/generate", {"input_ids": [1], "rid": "ab"})
        assert (again[0], "Duplicate request ID" in again[1]["message"]) == (400, True)
        assert "0 requests" in (await post("/abort_request", {"rid": "a"}))["message"], "no request has this name"
        assert "2 requests" in (await post("/abort_request", {"rid": "ab"}))["message"]
        for rid in ("ab", "abc"):
            answer = await waiting[rid]
            assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
            assert answer["output_ids"] == []
        assert "1 requests" in (await post("/abort_request", {"rid": "run"}))["message"]
        await asyncio.sleep(0.1)
        assert not running.done(), "a paused engine makes no token"
        await post("/continue_generation", {})
        assert (await waiting["b"])["meta_info"]["finish_reason"]["type"] == "length"
        meta = (await running)["meta_info"]
        assert (meta["finish_reason"]["type"], meta["finish_reason"]["message"]) == ("abort", "Aborted")
        assert 0 < meta["completion_tokens"] < 450

    asyncio.run(run())
