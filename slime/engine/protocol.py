"""SGLang's HTTP protocol, as far as slime uses it: the path of each endpoint, and its messages.

- Used by: `client` sends these to the router or to an engine; SGLang or `embedded.server` answers.
- Invariant: field names and URLs are SGLang's. They are written here (for engines on the trainers' devices: in
  `device_protocol`) and nowhere else.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from slime.core.columns import Array
from slime.core.list_fields import array_of, keep_as_arrays, set_array
from slime.core.pausing import PauseMode
from slime.engine.message import Message, require, short

CheckAction = Literal["checksum", "reset_tensors"]
WEIGHT_GROUP = "slime-weights"
"""The process group over which a trainer sends weights. Its name is fixed, so that a killed run's group is found."""


def weight_groups(owners: int) -> list[str]:
    """Return the name of the group over which each of so many owners of a part of the weights sends it."""
    return [WEIGHT_GROUP, *(f"{WEIGHT_GROUP}-{owner}" for owner in range(1, owners))]


class Endpoint(StrEnum):
    """Paths at an engine, which are SGLang's."""

    GENERATE = "/generate"
    ABORT_REQUEST = "/abort_request"
    PAUSE_GENERATION = "/pause_generation"
    CONTINUE_GENERATION = "/continue_generation"
    FLUSH_CACHE = "/flush_cache"
    HEALTH = "/health"
    LOADS = "/v1/loads"
    SERVER_INFO = "/server_info"
    MODEL_INFO = "/model_info"
    GET_SERVER_INFO = "/get_server_info"
    GET_MODEL_INFO = "/get_model_info"
    BEGIN_WEIGHT_UPDATE = "/begin_weight_update"
    END_WEIGHT_UPDATE = "/end_weight_update"
    INIT_WEIGHTS_UPDATE_GROUP = "/init_weights_update_group"
    UPDATE_WEIGHTS_FROM_DISTRIBUTED = "/update_weights_from_distributed"
    DESTROY_WEIGHTS_UPDATE_GROUP = "/destroy_weights_update_group"
    UPDATE_WEIGHTS_FROM_DISK = "/update_weights_from_disk"
    UPDATE_WEIGHTS_FROM_TENSOR = "/update_weights_from_tensor"
    WEIGHTS_CHECKER = "/weights_checker"
    RELEASE_MEMORY_OCCUPATION = "/release_memory_occupation"
    RESUME_MEMORY_OCCUPATION = "/resume_memory_occupation"


class RouterEndpoint(StrEnum):
    """Paths at the router, in addition to /generate and /health."""

    WORKERS = "/workers"


MAX_STOPS, MAX_STOP_LENGTH = 32, 4096
"""The most stop texts of a request (SGLang's limit from 0.5.21 on), and the most characters of each."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Message):
    """The sampling parameters of one response. Temperature 0 is greedy; top_k -1 is off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_new_tokens: int = 128
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    sampling_seed: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    spaces_between_special_tokens: bool = True
    """Has no effect on a fast tokenizer; it exists because SGLang has it."""
    min_new_tokens: int = 0
    """Must be 0."""
    n: int = 1
    """Must be 1: every sample is a request of its own."""

    def __post_init__(self) -> None:
        # These are the checks of SGLang's `verify`; integers are limited as in its kernels (top_k has 32 bits).
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, ">= 0 and finite")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k == -1 or 1 <= self.top_k < 2**31, "top_k", self.top_k, "-1 or in [1, 2**31)")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        require(0 <= self.max_new_tokens < 2**63, "max_new_tokens", self.max_new_tokens, "in [0, 2**63)")
        stops, longest = self.stop_strings, MAX_STOP_LENGTH
        require(len(stops) <= MAX_STOPS, "stop", self.stop, f"at most {MAX_STOPS} texts")
        good = all(isinstance(stop, str) and 0 < len(stop) <= longest for stop in stops)
        require(good, "stop", self.stop, f"a text of 1 to {longest} characters, or several")
        seed = self.sampling_seed
        require(seed is None or 0 <= seed < 2**63, "sampling_seed", seed, "in [0, 2**63)")
        require(self.min_new_tokens == 0, "min_new_tokens", self.min_new_tokens, "0")
        require(self.n == 1, "n", self.n, "1: send one request for each sample")

    @classmethod
    def from_json(cls, data: Any) -> SamplingParams:
        return super().from_json(_without_neutral(data, NEUTRAL_SAMPLING_FIELDS, "sampling_params"))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# Fields that SGLang or the router add to /generate, with the values that request nothing.
NEUTRAL_GENERATE_FIELDS: Mapping[str, tuple[object, ...]] = {
    "model": (None,),
    "return_text_in_logprobs": (False, None),
    "stream": (False, None),
    "log_metrics": (True, False, None),
    "return_hidden_states": (False, None),
    "background": (False, None),
    "no_logs": (True, False, None),
    "return_bytes": (False, None),
    "return_entropy": (False, None),
    "top_logprobs_num": (0, None),
    "token_ids_logprob": (None,),
    "lora_path": (None,),
}
NEUTRAL_SAMPLING_FIELDS: Mapping[str, tuple[object, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "beam_width": (1,),
}


def _without_neutral(data: Any, neutral: Mapping[str, tuple[object, ...]], name: str) -> dict[str, Any]:
    """Drop nulls and fields that request nothing from a JSON object; ValueError if such a field requests something."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} is {type(data).__name__}; it has to be a JSON object")
    body = {k: v for k, v in cast(Mapping[str, Any], data).items() if v is not None}
    for field_name, allowed in neutral.items():
        value = body.pop(field_name, None)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise ValueError(f"{field_name} is {short(value)}; this engine serves only {allowed[0]!r}")
    return body


MAX_RID_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Message):
    """The request to continue one prompt, given as token ids (or as `text`, if the engine has a tokenizer)."""

    input_ids: list[int] | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    rid: str | None = None
    return_logprob: bool = True
    logprob_start_len: int = -1
    """The first prompt position whose log-prob is returned, of the raw logits; -1 returns none. The first entry is
    None even if a token precedes it."""
    text: str | None = None
    return_routed_experts: bool = False
    """Whether to return the experts of each token except the last. (sglang-router would drop this field.)"""
    routed_experts_start_len: int = 0
    """The first token whose experts are returned; it is within the prompt."""
    fills_context: bool = False
    """Whether `max_new_tokens` is null in the JSON: as many tokens as the context has room for."""

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.text is None):
            raise ValueError("a /generate request has either input_ids or text")
        require(self.input_ids != [], "input_ids", self.input_ids, "a non-empty list of integers")
        require(len(self.rid or "") <= MAX_RID_LENGTH, "rid", self.rid, f"at most {MAX_RID_LENGTH} characters")
        require(self.logprob_start_len >= -1, "logprob_start_len", self.logprob_start_len, ">= -1")
        start = self.routed_experts_start_len
        require(start >= 0, "routed_experts_start_len", start, ">= 0")

    @classmethod
    def from_json(cls, data: Any) -> GenerateRequest:
        body = _without_neutral(data, NEUTRAL_GENERATE_FIELDS, "the body of GenerateRequest")
        require("fills_context" not in body, "fills_context", True, "left out: it is no field of the protocol")
        params: Any = body.pop("sampling_params", {})
        # SGLang returns log-probs only if asked; slime's own requests always ask.
        body.setdefault("return_logprob", False)
        body["sampling_params"] = SamplingParams.from_json(params)
        body["fills_context"] = params.get("max_new_tokens", 0) is None
        return super().from_json(body)

    def to_json(self) -> dict[str, Any]:
        own = super().to_json()
        del own["fills_context"]
        if not self.return_routed_experts:  # engines of dense models do not need to know the fields
            del own["return_routed_experts"], own["routed_experts_start_len"]
        params = self.sampling_params.to_json()
        return {**own, "sampling_params": {**params, "max_new_tokens": None} if self.fills_context else params}


def encode_routes(experts: NDArray[np.int32]) -> str:
    """Encode [tokens, layers, topk] as SGLang sends it: base64 of the bytes, whose shape the receiver has to know."""
    return base64.b64encode(experts.astype("<i4").tobytes()).decode("ascii")


def _decode_routes(text: str | None) -> NDArray[np.int32] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")


FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class GenerateResponse:
    """An engine's answer to one request. `log_probs` has one entry for each of `output_ids`.

    Both are list fields (see `core.list_fields`): read as lists, while `tokens_R` and `log_probs_R` are the arrays.
    """

    output_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    weight_version: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    input_log_probs: list[float | None]
    """The log-probs of the prompt itself, from `logprob_start_len` on; the first is None."""
    routed_experts: NDArray[np.int32] | None = field(default=None, compare=False)
    """Flat array with the experts of each token except the last in each layer (zeros for dense layers)."""

    @classmethod
    def aborted(cls) -> GenerateResponse:
        """Return the answer to a request that was aborted before an engine began to work on it."""
        return cls(
            output_ids=[],
            log_probs=[],
            finish_reason="abort",
            weight_version="",
            text="",
            prompt_tokens=0,
            completion_tokens=0,
            input_log_probs=[],
        )

    @property
    def tokens_R(self) -> Array:
        """The tokens of `output_ids` as int32, which nobody may change."""
        return cast(Array, array_of(self, "output_ids"))

    @property
    def log_probs_R(self) -> Array:
        """The log-probs as float64, which nobody may change."""
        return cast(Array, array_of(self, "log_probs"))

    def with_tokens(self, count: int, finish_reason: FinishReason) -> GenerateResponse:
        """Return the response with its first `count` tokens alone."""
        cut = replace(self, output_ids=[], log_probs=[], finish_reason=finish_reason)
        set_array(cut, "output_ids", self.tokens_R[:count])
        set_array(cut, "log_probs", self.log_probs_R[:count])
        return cut

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerateResponse:
        """Build a response. Raises KeyError if a field is missing, and ValueError if fields contradict each other."""
        output = data["meta_info"].get("output_token_logprobs") or []
        output_ids = list(data["output_ids"])
        if output and [entry[1] for entry in output] != output_ids:
            raise ValueError("output_token_logprobs and output_ids name different tokens")
        return cls.of(data, output_ids, [float(entry[0]) for entry in output])

    @classmethod
    def of(
        cls, data: Mapping[str, Any], output_ids: Sequence[int] | Array, log_probs: Sequence[float] | Array
    ) -> GenerateResponse:
        """Build a response whose columns have been read already. Raises as `from_json`."""
        meta = data["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in get_args(FinishReason):
            raise ValueError(f"finish_reason is {reason!r}; known are {', '.join(get_args(FinishReason))}")
        response = cls(
            output_ids=[],
            log_probs=[],
            finish_reason=reason,
            weight_version=str(meta.get("weight_version", "")),
            text=data.get("text") or "",
            prompt_tokens=int(meta.get("prompt_tokens", 0)),  # SGLang counts none if it never began
            completion_tokens=int(meta["completion_tokens"]),
            input_log_probs=[entry[0] for entry in meta.get("input_token_logprobs") or []],
            routed_experts=_decode_routes(meta.get("routed_experts")),
        )
        set_array(response, "output_ids", output_ids)
        set_array(response, "log_probs", log_probs)
        return response


keep_as_arrays(GenerateResponse, {"output_ids": "int32", "log_probs": "float64"})


@dataclass(frozen=True, kw_only=True)
class AbortRequest(Message):
    """Stop one request, or all; each answers with the tokens that it has."""

    rid: str = ""
    abort_all: bool = False


@dataclass(frozen=True, kw_only=True)
class PauseGeneration(Message):
    """Pause an engine, in one of the ways that `core.pausing` describes."""

    mode: PauseMode = "abort"

    def __post_init__(self) -> None:
        require(self.mode in get_args(PauseMode), "mode", self.mode, f"one of {', '.join(get_args(PauseMode))}")


def require_bucket(names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless each tensor of a bucket has a dtype, and a shape of at most 2**40 elements."""
    if len({len(names), len(dtypes), len(shapes)}) != 1:
        raise ValueError(
            f"{len(names)} names, {len(dtypes)} dtypes, {len(shapes)} shapes: they have to be as many as each other"
        )
    for shape in shapes:
        good = len(shape) <= 8 and all(size >= 0 for size in shape) and math.prod(shape) <= 2**40
        require(good, "shapes", shape, "at most 8 sizes >= 0 with a product of at most 2**40")


@dataclass(frozen=True, kw_only=True)
class InitWeightsUpdateGroup(Message):
    """Join a process group; rank 0 is the trainer, and an engine's first rank is `rank_offset`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"

    def __post_init__(self) -> None:
        require(0 < len(self.master_address) < 256, "master_address", self.master_address, "a host's name or address")
        require(0 < self.master_port < 2**16, "master_port", self.master_port, "in [1, 65535]")
        require(1 < self.world_size < 2**16, "world_size", self.world_size, "in [2, 65535]")
        require(0 < self.rank_offset < self.world_size, "rank_offset", self.rank_offset, "in [1, world_size)")


@dataclass(frozen=True, kw_only=True)
class DestroyWeightsUpdateGroup(Message):
    group_name: str = "weight_update_group"


@dataclass(frozen=True, kw_only=True)
class UpdateWeightsFromDistributed(Message):
    """Receive one bucket, which rank 0 broadcasts in the order of `names`.

    `load_format` "flattened_bucket": the bucket is one tensor of bytes (see `bucket_layout`).
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None

    def __post_init__(self) -> None:
        require_bucket(self.names, self.dtypes, self.shapes)
        require(
            self.load_format in (None, "flattened_bucket"), "load_format", self.load_format, "unset or flattened_bucket"
        )


@dataclass(frozen=True, kw_only=True)
class UpdateWeightsFromDisk(Message):
    model_path: str
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsChecker(Message):
    action: CheckAction = "checksum"

    def __post_init__(self) -> None:
        require(
            self.action in get_args(CheckAction), "action", self.action, f"one of {', '.join(get_args(CheckAction))}"
        )
