"""SGLang's answers to a /generate, by version, read from its source (the rule names the place).

The context has 512 tokens, the vocabulary 128. Some names replace what the engine sampled for `seed` before: STOP is a
token that comes first as number COUNT, and TEXT is its text. 0.5.22 and 0.5.23 answer as 0.5.21.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OLD, NEW = "0.5.16", "0.5.21"
STOP, TEXT, COUNT = "STOP", "TEXT", "COUNT"


@dataclass(frozen=True)
class Answer:
    """An answer: `tokens` and `reason` of a 200, or a word of the message of a 400. `matched` ended the response."""

    status: Literal[200, 400]
    reason: str | None = None
    tokens: int | str | None = None
    matched: str | None = None
    word: str = ""


@dataclass(frozen=True)
class Row:
    rule: str
    """The place in SGLang's source that decides it."""
    answers: dict[str, Answer | None]
    """Answers by version. None: it fails, or uses features that this engine lacks, such as several responses."""
    embedded: str = NEW
    """The version whose answer the embedded engine gives, or "refused": a 400 that names what it does not serve."""
    length: int = 3
    """The tokens of the input."""
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields in addition to the seed."""
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


def ended(reason: str, tokens: int | str, matched: str | None = None) -> dict[str, Answer | None]:
    """Return a row with the same answer for every version."""
    return dict.fromkeys((OLD, NEW), Answer(200, reason, tokens, matched))


def refused(word: str) -> dict[str, Answer | None]:
    return dict.fromkeys((OLD, NEW), Answer(400, word=word))


NONE: dict[str, Answer | None] = {OLD: None, NEW: None}
VALIDATE = "tokenizer_manager._validate_one_request"
CLIP = "scheduler.init_req_max_new_tokens"
VERIFY = "sampling_params.verify"
FINISH = "schedule_batch.update_finish_state"
START = "scheduler.handle_generate_request: logprob_start_len"
SINGLE = "io_struct._determine_batch_size"
NOT_SERVED = "refused"

ROWS: dict[str, Row] = {
    # ---- lengths
    "an input as long as the context": Row(VALIDATE, refused("longer than the model's context length"), length=512),
    "more tokens than the context has": Row(
        VALIDATE, refused("Requested token count exceeds"), length=500, params={"max_new_tokens": 13}
    ),
    "two tokens of the context stay free": Row(CLIP, ended("length", 10), length=500, params={"max_new_tokens": 12}),
    "the longest input": Row(CLIP, ended("length", 5), length=505, params={"max_new_tokens": 7}),
    "an input six below the context": Row(
        "utils.validate_input_length",
        refused("maximum allowed length (506 tokens)"),
        length=506,
        params={"max_new_tokens": 1},
    ),
    "null: up to the context": Row(CLIP, ended("length", 5), length=505, params={"max_new_tokens": None}),
    "no max_new_tokens": Row("sampling_params.SamplingParams", ended("length", 128)),
    "no token asked for": Row(CLIP, ended("length", 0), params={"max_new_tokens": 0}),
    "fewer than none": Row(VERIFY, refused("max_new_tokens"), params={"max_new_tokens": -1}),
    # ---- what ends a response
    "a stop token": Row(FINISH, ended("stop", COUNT, STOP), params={"max_new_tokens": 40, "stop_token_ids": [STOP]}),
    "a stop token as the last one": Row(
        FINISH,
        {OLD: Answer(200, "length", COUNT), NEW: Answer(200, "stop", COUNT, STOP)},
        embedded=OLD,
        params={"max_new_tokens": COUNT, "stop_token_ids": [STOP]},
    ),
    "a stop text as the last one": Row(
        FINISH,
        {OLD: Answer(200, "length", COUNT), NEW: Answer(200, "stop", COUNT, TEXT)},
        embedded=OLD,
        params={"max_new_tokens": COUNT, "stop": TEXT},
    ),
    "a stop text before the stop token": Row(
        FINISH,
        ended("stop", COUNT, TEXT),
        params={"max_new_tokens": 40, "stop_token_ids": [STOP], "stop": ["no such text", TEXT]},
    ),
    "ignore_eos ignores stop tokens": Row(
        "schedule_batch._check_token_based_finish",
        ended("length", 40),
        params={"max_new_tokens": 40, "stop_token_ids": [STOP], "ignore_eos": True},
    ),
    "ignore_eos minds stop texts": Row(
        FINISH, ended("stop", COUNT, TEXT), params={"max_new_tokens": 40, "stop": TEXT, "ignore_eos": True}
    ),
    "33 stop texts": Row(
        "sampling_params.normalize",
        {OLD: Answer(200, "length", 2), NEW: Answer(400, word="stop")},
        params={"max_new_tokens": 2, "stop": [f"no {i}" for i in range(33)]},
    ),
    "an empty stop text": Row(FINISH, ended("stop", 1, ""), NOT_SERVED, params={"stop": ""}),
    "a pattern": Row("schedule_batch._check_str_based_finish", NONE, NOT_SERVED, params={"stop_regex": "a+"}),
    "tokens before an end": Row("penaltylib.min_new_tokens", NONE, NOT_SERVED, params={"min_new_tokens": 2}),
    # ---- sampling
    "a negative temperature": Row(VERIFY, refused("temperature"), params={"temperature": -0.1}),
    "top_k 0": Row(VERIFY, refused("top_k"), params={"top_k": 0}),
    "top_k -1": Row(VERIFY, ended("length", 2), params={"top_k": -1, "max_new_tokens": 2}),
    "top_k beyond the vocabulary": Row(VERIFY, ended("length", 2), params={"top_k": 2**31 - 1, "max_new_tokens": 2}),
    "top_k beyond 32 bits": Row("sampling_batch_info: int32", NONE, NOT_SERVED, params={"top_k": 2**31}),
    "top_p 0": Row(VERIFY, refused("top_p"), params={"top_p": 0.0}),
    "top_p above 1": Row(VERIFY, refused("top_p"), params={"top_p": 1.01}),
    "min_p above 1": Row(VERIFY, refused("min_p"), params={"min_p": 1.5}),
    "a seed beyond 64 bits": Row(
        VERIFY, {OLD: None, NEW: Answer(400, word="sampling_seed")}, params={"sampling_seed": 2**63}
    ),
    "a negative seed": Row(VERIFY, ended("length", 2), NOT_SERVED, params={"sampling_seed": -1, "max_new_tokens": 2}),
    "neutral penalties": Row(
        VERIFY, ended("length", 2), params={"max_new_tokens": 2, "frequency_penalty": 0, "repetition_penalty": 1.0}
    ),
    "a penalty": Row(VERIFY, NONE, NOT_SERVED, params={"presence_penalty": 0.5}),
    "two samples": Row("io_struct._handle_parallel_sampling", NONE, NOT_SERVED, params={"n": 2}),
    "an unknown parameter": Row("sampling_params.SamplingParams", NONE, NOT_SERVED, params={"temprature": 1.0}),
    # ---- what goes in
    "neither text nor tokens": Row("io_struct._validate_inputs", refused("input_ids"), fields={"input_ids": None}),
    "no tokens": Row(SINGLE, refused("input_ids"), fields={"input_ids": []}),
    "several texts": Row(SINGLE, NONE, NOT_SERVED, fields={"input_ids": None, "text": ["1", "2"]}),
    "several inputs": Row(SINGLE, NONE, NOT_SERVED, fields={"input_ids": [[1], [2]]}),
    "a token beyond the vocabulary": Row("the embedding", NONE, NOT_SERVED, fields={"input_ids": [1, 128]}),
    "a negative token": Row("the embedding", NONE, NOT_SERVED, fields={"input_ids": [-1]}),
    "several names": Row("io_struct._normalize_rid", NONE, NOT_SERVED, fields={"rid": ["a"]}),
    "a list of return_logprob": Row(
        "io_struct._normalize_logprob_params", NONE, NOT_SERVED, fields={"return_logprob": [True]}
    ),
    "a list of parameters": Row(
        "io_struct._normalize_sampling_params", NONE, NOT_SERVED, fields={"sampling_params": [{}]}
    ),
    # ---- what comes back
    "a start after the input": Row(
        START, refused("logprob_start_len"), fields={"return_logprob": True, "logprob_start_len": 4}
    ),
    "a start after the input, and no log-probs": Row(
        START, ended("length", 2), params={"max_new_tokens": 2}, fields={"logprob_start_len": 4}
    ),
    "a start below -1": Row(START, NONE, NOT_SERVED, fields={"return_logprob": True, "logprob_start_len": -2}),
    "an answer in pieces": Row("http_server.generate_request", NONE, NOT_SERVED, fields={"stream": True}),
    "several candidates": Row("add_logprob_to_meta_info", NONE, NOT_SERVED, fields={"top_logprobs_num": 2}),
}

INPUT_LOG_PROBS: dict[int, list[int] | None] = {-1: [], 0: [1, 40, 50], 1: [40, 50], 2: [50], 3: []}
"""`logprob_start_len` -> the tokens of input_token_logprobs for the input [1, 40, 50]. The first has no log-prob, even
if a token precedes it, and temperature does not count (logprob_result_processor._process_input_token_logprobs).
"""
