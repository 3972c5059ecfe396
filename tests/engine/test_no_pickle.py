"""The embedded engine unpickles nothing that comes over HTTP, at no endpoint and in no field."""

from __future__ import annotations

import base64
import json
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from slime.engine.protocol import Endpoint
from tests.forked_engine import ForkedEngine


class Touches:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def post(url: str, body: bytes, content_type: str) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_a_pickled_body_is_refused_and_not_executed(glm4_engine: ForkedEngine, tmp_path: Path, protocol: int) -> None:
    made = tmp_path / "made"
    body = pickle.dumps(Touches(made), protocol=protocol)
    for endpoint in Endpoint:
        for content_type in ("application/octet-stream", "application/x-pickle", "application/json"):
            status = post(glm4_engine.url + endpoint, body, content_type)
            assert status in (400, 404, 405), endpoint
    text = base64.b64encode(body).decode()
    for fields in (
        {"serialized_named_tensors": [text]},
        {"serialized_named_tensors": text, "load_format": "flattened_bucket"},
        {"shared_memory": text},
        {"input_ids": text, "model_path": text, "names": text, "sampling_params": text},
    ):
        for endpoint in Endpoint:
            assert post(glm4_engine.url + endpoint, json.dumps(fields).encode(), "application/json") >= 400, endpoint
    assert not made.exists()
    pickle.loads(body)
    assert made.exists(), "control: whoever unpickles it shows"
