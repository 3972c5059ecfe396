"""Read the answer to /generate: the log-probs and tokens of a long response become arrays, without Python objects.

- Called by: `client` with each answer; `protocol.GenerateResponse` is the result.
- Invariant: the numbers are those of `orjson.loads`, to the bit. An answer in any other form than the usual one is read
  by orjson, and `GenerateResponse.from_json` decides whether it can be used.

Nearly the whole answer is one list, with a row for each token: its log-prob, its id, and null for its text:

    "output_token_logprobs":[[-0.53,1204,null],[-1.27,88,null]]

simdjson copies a list of numbers into a buffer, but not one that has nulls. So the text between two rows is replaced by
a comma and blanks, which leaves one flat list:

    "output_token_logprobs": [-0.53,1204,       -1.27,88     ]
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import orjson
import simdjson

from slime.core.columns import Array
from slime.engine.protocol import GenerateResponse

_SHORT = 8192
"""Bytes of an answer up to which orjson is as fast."""
_BEGIN = b'"output_token_logprobs":[['
_BETWEEN, _BLANKS, _LAST = b",null],[", b",       ", b",null"
_TOKENS, _META, _LOG_PROBS = "output_ids", "meta_info", "output_token_logprobs"


def read_answer(raw: bytes, *, with_log_probs: bool = True) -> GenerateResponse:
    """Return the response in an answer's body.

    Raises:
        ValueError: it is no JSON, not an answer of SGLang's, or has not a log-prob for each token where it has to.
    """
    response = _read_usual(raw) if len(raw) > _SHORT else None
    if response is None:
        try:
            response = GenerateResponse.from_json(orjson.loads(raw))
        except orjson.JSONDecodeError as error:
            raise ValueError(f"the answer is no JSON: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the answer is not SGLang's: {error!r}") from error
    count, expected = len(response.log_probs_R), len(response.tokens_R)
    if with_log_probs and count != expected:
        raise ValueError(f"the answer holds {count} log-probs for {expected} tokens")
    return response


class _Tools(threading.local):
    """Memory that a thread uses for one answer after another; new memory costs as much as the work in it."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()
        self.copy = np.empty(0, dtype=np.uint8)
        self.mask = np.empty(0, dtype=np.bool_)

    def of_size(self, size: int) -> tuple[Array, Array]:
        """Return room for a copy of `size` bytes, and for one truth value for each."""
        if len(self.copy) < size:
            self.copy, self.mask = np.empty(2 * size, dtype=np.uint8), np.empty(2 * size, dtype=np.bool_)
        return self.copy[:size], self.mask[:size]


_tools = _Tools()


def _read_usual(raw: bytes) -> GenerateResponse | None:
    """Return the response if the answer has the usual form, else None."""
    flat = _flat_rows(raw)
    if flat is None:
        return None
    try:
        answer, numbers = _split(_tools.parser.parse(flat), _TOKENS, _META)
        meta, rows = _split(numbers[_META], _LOG_PROBS)
        tokens_R = np.frombuffer(numbers[_TOKENS].as_buffer(of_type="i"), dtype=np.int64)
        pairs = np.frombuffer(rows[_LOG_PROBS].as_buffer(of_type="d"), dtype=np.float64)
        if len(pairs) != 2 * len(tokens_R) or not np.array_equal(pairs[1::2], tokens_R):
            return None
        return GenerateResponse.of({**answer, _META: meta}, tokens_R, pairs[::2].copy())
    except (ValueError, KeyError, TypeError, AttributeError):  # other JSON than expected, or none
        # The error still refers to the parser's document, and a parser reads the next one only once that is free.
        _tools.parser = simdjson.Parser()
        return None


def _flat_rows(raw: bytes) -> Any:
    """Return the answer with its rows made one flat list, as a buffer; None if they are not all of the usual form."""
    begin = raw.find(_BEGIN) + len(_BEGIN)
    if begin < len(_BEGIN):
        return None
    answer, mask = _tools.of_size(len(raw))
    answer[:] = np.frombuffer(raw, dtype=np.uint8)
    rows = answer[begin:]
    closing = np.equal(rows, ord("]"), out=mask[: len(rows)])
    ends = closing[:-1] & closing[1:]
    end = int(np.argmax(ends)) if len(ends) else 0
    rows, closing = rows[:end], closing[:end]  # without the brackets around all
    num_brackets = np.count_nonzero(closing) + np.count_nonzero(np.equal(rows, ord("["), out=closing))
    ends_of_rows = np.flatnonzero(np.equal(rows, ord("n"), out=closing)) - 1
    if not len(ends_of_rows) or len(rows) < 8 or ends_of_rows[0] < 0 or rows[ends_of_rows[-1] :].tobytes() != _LAST:
        return None
    if num_brackets != 2 * (len(ends_of_rows) - 1):  # simdjson would flatten a list within a row
        return None
    # The eight bytes from every position as one number: reading and replacing `,null],[` are one step each.
    eight = np.ndarray((len(rows) - 7,), dtype=np.uint64, buffer=rows, strides=(1,))
    between = ends_of_rows[:-1]
    if not (eight[between] == np.frombuffer(_BETWEEN, dtype=np.uint64)).all():
        return None
    eight[between] = np.frombuffer(_BLANKS, dtype=np.uint64)
    rows[ends_of_rows[-1] :] = ord(" ")
    answer[[begin - 1, begin + end]] = ord(" ")
    return answer.data


def _split(objects: Any, *held: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of a JSON object as Python objects, and those in `held` as simdjson holds them.

    Raises:
        ValueError: a key occurs twice; simdjson would return the first one, orjson the last.
    """
    names = list(objects.keys())
    if len(set(names)) < len(names):
        raise ValueError("a key occurs twice")
    values = {name: objects[name] for name in names}
    return {name: _plain(value) for name, value in values.items() if name not in held}, {
        name: values[name] for name in held
    }


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if isinstance(value, simdjson.Array) else value
