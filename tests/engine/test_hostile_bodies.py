"""Whatever is posted to an embedded engine, it answers 200 or 4xx in JSON, and works as before."""

from __future__ import annotations

import gzip
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime.engine.embedded.server import MAX_BODY
from slime.engine.protocol import Endpoint
from tests.forked_engine import ForkedEngine

GENERATE: dict[str, Any] = {
    "input_ids": [1, 40, 50],
    "return_logprob": True,
    "logprob_start_len": 0,
    "rid": "r",
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "stream": False,
    "top_logprobs_num": 0,
    "sampling_params": {
        "max_new_tokens": 2,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop": ["a"],
        "stop_token_ids": [3],
        "sampling_seed": 4,
        "ignore_eos": False,
        "min_new_tokens": 0,
        "n": 1,
        "repetition_penalty": 1.0,
    },
}
BUCKET: dict[str, Any] = {"names": ["lm_head.weight"], "dtypes": ["float32"], "shapes": [[128, 64]]}
# Each of the others is refused unchanged: a valid one would change the engine's weights, or wait for a trainer.
BODIES: dict[Endpoint, dict[str, Any]] = {
    Endpoint.GENERATE: GENERATE,
    Endpoint.ABORT_REQUEST: {"rid": "nobody's", "abort_all": False},
    Endpoint.PAUSE_GENERATION: {"mode": "no mode"},
    Endpoint.CONTINUE_GENERATION: {"colour": 1},
    Endpoint.FLUSH_CACHE: {"colour": 1},
    Endpoint.INIT_WEIGHTS_UPDATE_GROUP: {
        "master_address": "127.0.0.1",
        "master_port": 1,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": "g",
        "backend": "no backend",
    },
    Endpoint.DESTROY_WEIGHTS_UPDATE_GROUP: {"group_name": "g"},
    Endpoint.BEGIN_WEIGHT_UPDATE: {"colour": 1},
    Endpoint.END_WEIGHT_UPDATE: {"colour": 1},
    Endpoint.UPDATE_WEIGHTS_FROM_DISTRIBUTED: {**BUCKET, "group_name": "g", "load_format": "flattened_bucket"},
    Endpoint.UPDATE_WEIGHTS_FROM_DISK: {"model_path": "/no/such/directory", "weight_version": "1"},
    Endpoint.UPDATE_WEIGHTS_FROM_TENSOR: {"shared_memory": {"path": "/proc/1/fd/0", **BUCKET}},
    Endpoint.WEIGHTS_CHECKER: {"action": "no action"},
    Endpoint.RELEASE_MEMORY_OCCUPATION: {"tags": ["weights"], "colour": 1},
    Endpoint.RESUME_MEMORY_OCCUPATION: {"tags": ["weights"], "colour": 1},
}
NAN = float("nan")
# fmt: off
HOSTILE: list[Any] = [
    None, True, -1, 0, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.5, 1e-300, 1e308, NAN,
    float("inf"), "", "x" * 70_000, "\0", "../" * 99, "\U0001f600", [], {}, [[]], {"a": {"b": [{}]}}, [None], [True],
    ["a"], [""], ["a"] * 99, [1.5], [-1], [127], [128], [2**31], [2**63], [2**64], [1] * 505, [1] * 506, [1] * 600,
    [[1, 2], [3]], [{"a": 1}], [-1, -1], [2**40, 2**40], [1] * 9,
]
# fmt: on


def post(engine: ForkedEngine, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(engine.url).netloc, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def tokens_of_a_normal_request(engine: ForkedEngine) -> list[int]:
    status, answer = post(engine, Endpoint.GENERATE, json.dumps(GENERATE).encode())
    assert status == 200, answer
    return answer["output_ids"]


def check(engine: ForkedEngine, path: str, body: bytes, **headers: str) -> None:
    status, answer = post(engine, path, body, **headers)
    assert status == 200 or 400 <= status < 500, (path, body[:300], status, answer)
    if status != 200:
        assert len(answer["error"]["message"]) < 2000
        assert "Traceback" not in answer["error"]["message"]


@st.composite
def changed_bodies(draw: st.DrawFn) -> tuple[Endpoint, bytes]:
    """Return an endpoint and its body, with one or two of its values replaced at any depth."""
    endpoint = draw(st.sampled_from([Endpoint.GENERATE] * len(BODIES) + list(BODIES)))
    body = json.loads(json.dumps(BODIES[endpoint]))
    for _ in range(draw(st.integers(1, 2))):
        inner = next((v for v in body.values() if isinstance(v, dict)), None)
        target = inner if inner and draw(st.booleans()) else body
        kept = {"colour", "backend"}  # the fields for which the unchanged body is refused
        names = sorted(set(target) - kept)
        if names:
            name = draw(st.sampled_from(names))
            # (null would request all of the context, or a pause)
            target[name] = draw(st.sampled_from(HOSTILE[1:] if name in ("max_new_tokens", "mode") else HOSTILE))
    return endpoint, json.dumps(body).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=changed_bodies())
@example(changed=(Endpoint.GENERATE, b'{"input_ids":[1],"sampling_params":{"top_k":9223372036854775808}}'))
@example(changed=(Endpoint.GENERATE, b'{"input_ids":[1],"sampling_params":{"top_k":9223372036854775807}}'))
@example(changed=(Endpoint.GENERATE, b'{"text":["a","b"],"sampling_params":{}}'))
@example(changed=(Endpoint.GENERATE, b'{"input_ids":[1],"sampling_params":[{}]}'))
@example(changed=(Endpoint.GENERATE, b'{"input_ids":[1],"rid":"\\ud800"}'))
@example(changed=(Endpoint.GENERATE, b'{"input_ids":[1e999]}'))
@example(changed=(Endpoint.DESTROY_WEIGHTS_UPDATE_GROUP, json.dumps({"group_name": "x" * 70_000}).encode()))
def test_no_body_harms_an_engine(glm4_engine: ForkedEngine, changed: tuple[Endpoint, bytes]) -> None:
    expected = tokens_of_a_normal_request(glm4_engine)
    check(glm4_engine, *changed)
    assert tokens_of_a_normal_request(glm4_engine) == expected


def test_no_bytes_harm_an_engine(glm4_engine: ForkedEngine) -> None:
    expected = tokens_of_a_normal_request(glm4_engine)
    bodies = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'"\\ud800"',
        b"null",
        b"7",
        b"{",
        b'{"' + b"k" * 100_000 + b'": 1}',
    ]
    for endpoint in BODIES:
        for body in bodies:
            check(glm4_engine, endpoint, body)
    check(glm4_engine, Endpoint.GENERATE, b"no gzip", **{"Content-Encoding": "gzip"})
    check(glm4_engine, Endpoint.GENERATE, gzip.compress(b" " * (MAX_BODY + 1)), **{"Content-Encoding": "gzip"})
    assert post(glm4_engine, "/no/such/path", b"{}")[0] == 404
    assert post(glm4_engine, Endpoint.SERVER_INFO, b"{}")[0] == 405
    status, answer = post(glm4_engine, Endpoint.GENERATE, b" " * (MAX_BODY + 1))
    assert (status, "error" in answer) == (413, True)
    assert tokens_of_a_normal_request(glm4_engine) == expected


def test_each_unchanged_body_gets_its_usual_answer(glm4_engine: ForkedEngine) -> None:
    """Control: the fields that are changed above exist, so it is their values that are refused."""
    for endpoint, body in BODIES.items():
        status, answer = post(glm4_engine, endpoint, json.dumps(body).encode())
        assert status == (200 if endpoint in (Endpoint.GENERATE, Endpoint.ABORT_REQUEST) else 400), answer
        if "colour" not in body and status == 400:
            assert "no field" not in answer["message"], answer
