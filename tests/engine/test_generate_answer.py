"""Answers to /generate: a long one is read into arrays with the very numbers that orjson reads, or by orjson."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.core.list_fields import stored
from slime.engine import generate_answer
from slime.engine.generate_answer import read_answer
from slime.engine.protocol import GenerateResponse

read_usual = generate_answer._read_usual  # pyright: ignore[reportPrivateUsage]


def answer(rows: list[list[Any]], ids: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": 'a "b" \\ é',
        "finish_reason": {"type": "stop", "matched": [3, None]},
        "prompt_tokens": 5,
        "weight_version": "12",
        "completion_tokens": len(rows),
        "input_token_logprobs": [[None, 7, None], [-0.25, 8, None]],
        "output_token_logprobs": rows,
        "later": [[1, 2]],
    }
    own = [row[1] for row in rows] if ids is None else ids
    return {"text": 'said "output_token_logprobs":[[1,2,null]]é\n', "output_ids": own, "meta_info": meta | changes}


def bits(values: Any) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


floats = st.floats(allow_nan=False, allow_infinity=False) | st.floats(width=32, max_value=0, allow_infinity=False).map(
    float
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(floats, st.integers(0, 2**31 - 1)), min_size=1, max_size=40))
def test_the_numbers_are_those_of_json(pairs: list[tuple[float, int]]) -> None:
    rows = [[log_prob, token, None] for log_prob, token in pairs]
    raw = orjson.dumps(answer(rows))
    read, expected = read_usual(raw), json.loads(raw)
    assert read is not None, "the usual form"
    assert read == GenerateResponse.from_json(orjson.loads(raw))
    assert bits(read.log_probs_R) == bits(row[0] for row in expected["meta_info"]["output_token_logprobs"])
    assert read.tokens_R.tolist() == expected["output_ids"] and read.text == expected["text"]
    assert (read.finish_reason, read.weight_version, read.prompt_tokens) == ("stop", "12", 5)
    assert read.input_log_probs == [None, -0.25]


NUMBERS = ["-0.0", "0", "-5", "1e5", "-1E-7", "4.9e-324", "1e-400", "0.1234567890123456789", "123456789012345678",
           "-2.2250738585072011e-308", "9007199254740993", "1.7976931348623157e308"]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_every_form_are_equal(number: str) -> None:
    raw = orjson.dumps(answer([[-0.5, 1, None], [77.25, 2, None]])).replace(b"77.25", number.encode())
    read = read_usual(raw)
    assert read is not None
    assert bits(read.log_probs_R) == bits(row[0] for row in json.loads(raw)["meta_info"]["output_token_logprobs"])


ROWS = [[-0.5, 1, None], [-0.25, 2, None], [-2.0, 3, None]]
ODD: dict[str, bytes] = {
    "spaces": json.dumps(answer(ROWS)).encode(),
    "text in third place": orjson.dumps(answer([[-0.5, 1, "a"], [-0.25, 2, "null],["], [-2.0, 3, "c"]])),
    "some texts": orjson.dumps(answer([[-0.5, 1, None], [-0.25, 2, ",null],["], [-2.0, 3, None]])),
    "numbers in third place": orjson.dumps(answer([[-0.5, 1, 0], [-0.25, 2, 0], [-2.0, 3, 0]])),
    "four entries": orjson.dumps(answer([[-0.5, 1, 7, None], [-0.25, 2, 7, None], [-2.0, 3, 7, None]])),
    "no log-prob": orjson.dumps(answer([[-0.5, 1, None], [None, 2, None], [-2.0, 3, None]])),
    "an id of two": orjson.dumps(answer([[-0.5, [1], None], [-0.25, 2, None], [-2.0, 3, None]], [1, 2, 3])),
    "nested": orjson.dumps(answer([[[-0.5], 1, None], [-0.25, 2, None], [-2.0, 3, None]], [1, 2, 3])),
    "other ids": orjson.dumps(answer(ROWS, [1, 3, 2])),
    "fewer ids": orjson.dumps(answer(ROWS, [1, 2])),
    "ids that are no whole numbers": orjson.dumps(answer(ROWS)).replace(b"[1,2,3]", b"[1.5,2,3]"),
    "an id of 64 bits": orjson.dumps(answer([[-0.5, 2**40, None]])),
    "a negative id": orjson.dumps(answer([[-0.5, -(2**40), None]])),
    "no rows": orjson.dumps(answer([])),
    "rows left out": orjson.dumps({"output_ids": [1], "text": "", "meta_info": {"finish_reason": {"type": "abort"}}}),
    "NaN": orjson.dumps(answer(ROWS)).replace(b"-0.25", b"NaN"),
    "Infinity": orjson.dumps(answer(ROWS)).replace(b"-0.25", b"-Infinity"),
    "a number without end": orjson.dumps(answer(ROWS)).replace(b"-0.25", b"-0."),
    "a number with zeros": orjson.dumps(answer(ROWS)).replace(b"-0.25", b"-00.25"),
    "other reason": orjson.dumps(answer(ROWS, finish_reason={"type": "tired"})),
    "a key twice": orjson.dumps(answer(ROWS)).replace(b'"later":[[1,2]]', b'"output_token_logprobs":[[-9,9,null]]'),
    "no object": b"[1,2]",
    "plain text": b"all is well",
    "bytes that are no text": orjson.dumps(answer(ROWS)).replace(b"said", b"\xff\xfe"),
}


def outcome(raw: bytes) -> Any:
    """Return what reading by orjson gives: the response, or the kind of error."""
    try:
        return GenerateResponse.from_json(orjson.loads(raw))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return type(error)


@pytest.mark.parametrize("name", ODD)
def test_odd_answers_are_read_by_orjson(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_answer, "_SHORT", 0)
    raw, expected = ODD[name], outcome(ODD[name])
    if isinstance(expected, type):
        with pytest.raises(ValueError, match=r"the answer is no(t SGLang's| JSON): "):
            read_answer(raw)
    else:
        assert read_answer(raw, with_log_probs=False) == expected
    usual = orjson.dumps(answer(ROWS))
    assert read_usual(usual) == outcome(usual) and raw != usual, "control: this one is read without orjson"


@pytest.mark.parametrize("name", [name for name in ODD if name not in ("other reason",)])
def test_odd_answers_are_not_the_usual_form(name: str) -> None:
    try:
        assert read_usual(ODD[name]) is None
    except ValueError:
        assert isinstance(outcome(ODD[name]), type)


def test_truncated_answers_are_refused() -> None:
    raw = orjson.dumps(answer(ROWS))
    for end in range(len(raw)):
        assert read_usual(raw[:end]) is None, end


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_byte_is_never_read_differently(data: st.DataObject) -> None:
    """Whatever byte changes: the numbers are orjson's, or the answer is refused."""
    raw = bytearray(orjson.dumps(answer([*ROWS, [-12.5, 40, None]])))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'0123456789-+.eE,[]{}"nul tr\\\xff'))
    expected = outcome(bytes(raw))
    try:
        read = read_usual(bytes(raw))
    except ValueError:
        read = None
    if read is not None:
        assert read == expected


def test_long_and_short_answers_become_arrays() -> None:
    for count in (3, 2000):
        rows = [[-0.5 * n, n, None] for n in range(count)]
        read = read_answer(orjson.dumps(answer(rows)))
        assert (read.tokens_R.dtype, read.log_probs_R.dtype) == (np.int32, np.float64)
        assert isinstance(stored(read, "output_ids"), np.ndarray) and isinstance(stored(read, "log_probs"), np.ndarray)
        assert read.output_ids == list(range(count)) and math.isclose(read.log_probs[-1], -0.5 * (count - 1))
