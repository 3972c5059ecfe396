"""SGLang's HTTP protocol, as far as slime speaks it: where each endpoint stands and what goes over it.

Path: `client` sends these to the router or to an engine, and SGLang or `embedded.server` answers.
Invariant: field names and URLs are SGLang's, and are written down here (for engines that share their devices with
trainers: in `device_protocol`) and nowhere else.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

PauseMode = Literal["abort", "in_place", "retract"]
CheckAction = Literal["checksum", "reset_tensors"]
WEIGHT_GROUP = "slime-weights"
"""The process group over which a trainer sends weights. One name: what a killed run left is found by it."""


class Endpoint(StrEnum):
    """Paths at an engine (SGLang's)."""

    GENERATE = "/generate"
    ABORT_REQUEST = "/abort_request"
    PAUSE_GENERATION = "/pause_generation"
    CONTINUE_GENERATION = "/continue_generation"
    FLUSH_CACHE = "/flush_cache"
    HEALTH = "/health"
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
    """Paths at the router, besides /generate and /health."""

    WORKERS = "/workers"


class Message:
    """A body: a dataclass that knows its way to JSON and back. None means "not sent"; `Message()` is an empty body."""

    @classmethod
    def from_json(cls, data: Any) -> Any:
        """Build from a decoded JSON object.

        Raises:
            ValueError: not an object, an unknown field, or a missing one.
        """
        name = cls.__name__
        if not isinstance(data, Mapping):
            raise ValueError(f"{name}: the body is {type(data).__name__}, it has to be a JSON object")
        known = {f.name for f in fields(cls)}  # pyright: ignore[reportArgumentType]
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {repr(value)[:100]}; it has to be {rule}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Message):
    """How one response is sampled. Temperature 0 is greedy; top_k -1 is off."""

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
    """Has no effect on a fast tokenizer; named because SGLang has it."""
    min_new_tokens: int = 0
    """Only 0."""
    n: int = 1
    """Only 1: every sample is a request of its own."""

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(_is_int(self.top_k) and (self.top_k == -1 or self.top_k >= 1), "top_k", self.top_k, "-1 or >= 1")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, ">= 0"
        )
        stops = self.stop_strings
        _require(all(isinstance(s, str) and s for s in stops), "stop", self.stop, "a non-empty string or several")
        ids = self.stop_token_ids or ()
        _require(isinstance(ids, Sequence) and all(map(_is_int, ids)), "stop_token_ids", ids, "a list of integers")
        seed = self.sampling_seed
        _require(seed is None or (_is_int(seed) and 0 <= seed < 2**63), "sampling_seed", seed, "in [0, 2**63)")
        _require(self.min_new_tokens == 0, "min_new_tokens", self.min_new_tokens, "0")
        _require(self.n == 1, "n", self.n, "1: send one request a sample")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


# Fields that SGLang or the router put into /generate, with the values under which they ask for nothing.
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


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Message):
    """One prompt, as token ids (or `text`, where the engine has a tokenizer)."""

    input_ids: list[int] | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    rid: str | None = None
    return_logprob: bool = True
    logprob_start_len: int = -1
    """From which prompt position on to return the prompt's own log-probs; -1: none."""
    text: str | None = None
    return_routed_experts: bool = False
    """Say to which experts each token but the last went. (sglang-router would drop this.)"""
    routed_experts_start_len: int = 0
    """From which token on; not behind the prompt."""

    def __post_init__(self) -> None:
        if (self.input_ids is None) == (self.text is None):
            raise ValueError("a /generate request has either input_ids or text")
        if self.input_ids is not None:
            ids = self.input_ids
            good = isinstance(ids, list) and len(ids) > 0 and all(map(_is_int, ids))
            _require(good, "input_ids", ids, "a non-empty list of integers")
        _require(self.rid is None or isinstance(self.rid, str), "rid", self.rid, "a string")
        _require(isinstance(self.return_logprob, bool), "return_logprob", self.return_logprob, "true or false")
        _require(
            _is_int(self.logprob_start_len) and self.logprob_start_len >= -1,
            "logprob_start_len",
            self.logprob_start_len,
            ">= -1",
        )
        routed, start = self.return_routed_experts, self.routed_experts_start_len
        _require(isinstance(routed, bool), "return_routed_experts", routed, "true or false")
        _require(_is_int(start) and start >= 0, "routed_experts_start_len", start, ">= 0")

    @classmethod
    def from_json(cls, data: Any) -> GenerateRequest:
        if not isinstance(data, Mapping):
            raise ValueError(f"GenerateRequest: the body is {type(data).__name__}, it has to be a JSON object")
        body = {k: v for k, v in data.items() if v is not None}
        for name, allowed in NEUTRAL_GENERATE_FIELDS.items():
            value = body.pop(name, None)
            if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
                raise ValueError(f"{name} is {value!r}; this engine serves only {allowed[0]!r}")
        params = {k: v for k, v in (body.pop("sampling_params", None) or {}).items() if v is not None}
        # SGLang answers without log-probs unless asked; slime's own requests always ask.
        body.setdefault("return_logprob", False)
        return super().from_json({**body, "sampling_params": SamplingParams.from_json(params)})

    def to_json(self) -> dict[str, Any]:
        own = super().to_json()
        if not self.return_routed_experts:  # engines of dense models need not know the fields
            del own["return_routed_experts"], own["routed_experts_start_len"]
        return {**own, "sampling_params": self.sampling_params.to_json()}


def encode_routes(experts: NDArray[np.int32]) -> str:
    """[tokens, layers, topk] as SGLang sends it: base64 of its bytes, the shape for the receiver to know."""
    return base64.b64encode(experts.astype("<i4").tobytes()).decode("ascii")


def _decode_routes(text: str | None) -> NDArray[np.int32] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")


FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class GenerateResponse:
    """What an engine made of one request. `log_probs` goes with `output_ids`, one each."""

    output_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    weight_version: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    input_log_probs: list[float | None]
    """The prompt's own, from `logprob_start_len` on; None at position 0, which nothing predicts."""
    routed_experts: NDArray[np.int32] | None = field(default=None, compare=False)
    """Flat: of each token but the last, in each of the model's layers (zeros where it is dense), its experts."""

    @classmethod
    def aborted(cls) -> GenerateResponse:
        """What is said for a request that was aborted before an engine had begun with it."""
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GenerateResponse:
        """Raises KeyError where a field is missing, ValueError where they contradict each other."""
        meta = data["meta_info"]
        output = meta.get("output_token_logprobs") or []
        output_ids = list(data["output_ids"])
        if output and [entry[1] for entry in output] != output_ids:
            raise ValueError("output_token_logprobs and output_ids name different tokens")
        reason = meta["finish_reason"]["type"]
        if reason not in get_args(FinishReason):
            raise ValueError(f"finish_reason is {reason!r}; known are {', '.join(get_args(FinishReason))}")
        return cls(
            output_ids=output_ids,
            log_probs=[float(entry[0]) for entry in output],
            finish_reason=reason,
            weight_version=str(meta.get("weight_version", "")),
            text=data.get("text") or "",
            prompt_tokens=int(meta.get("prompt_tokens", 0)),  # SGLang counts none where it never began
            completion_tokens=int(meta["completion_tokens"]),
            input_log_probs=[entry[0] for entry in meta.get("input_token_logprobs") or []],
            routed_experts=_decode_routes(meta.get("routed_experts")),
        )


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself; None: it does not say."""

    model_path: str
    weight_version: str
    weights_complete: bool
    """Not in the middle of a set of weights that a trainer has never finished sending."""
    num_ranks: int
    """Members that it brings into a weight group."""
    dtype: str | None
    context_length: int | None
    model_type: str | None
    """As in config.json."""
    architecture: Mapping[str, Any] | None
    """The fields of `core.architecture.Architecture` (the embedded engine)."""
    deterministic: bool
    """Whether what a request gets does not depend on the others."""
    returns_routed_experts: bool = False
    """Whether it says to which experts tokens went."""

    @classmethod
    def from_json(cls, server: Mapping[str, Any], model: Mapping[str, Any]) -> EngineInfo:
        """From /server_info and /model_info. Raises KeyError where they are not SGLang's."""
        dtype = server.get("dtype")
        return cls(
            model_path=str(model["model_path"]),
            weight_version=str(model["weight_version"]),
            weights_complete=bool(server.get("weights_complete", True)),
            num_ranks=int(server["tp_size"]),
            dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
            context_length=server.get("context_length"),
            model_type=model.get("model_type"),
            architecture=model.get("architecture"),
            deterministic=bool(server.get("enable_deterministic_inference", False)),
            returns_routed_experts=bool(server.get("enable_return_routed_experts", False)),
        )


@dataclass(frozen=True, kw_only=True)
class AbortRequest(Message):
    """Stop one request, or all; each answers with what it has."""

    rid: str = ""
    abort_all: bool = False


@dataclass(frozen=True, kw_only=True)
class PauseGeneration(Message):
    """abort: stop all requests; in_place: keep them and their KV; retract: keep them, prefill them anew later."""

    mode: PauseMode = "abort"

    def __post_init__(self) -> None:
        _require(self.mode in get_args(PauseMode), "mode", self.mode, f"one of {', '.join(get_args(PauseMode))}")


@dataclass(frozen=True, kw_only=True)
class InitWeightsUpdateGroup(Message):
    """Join a process group; rank 0 is the trainer, an engine's first rank is `rank_offset`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


@dataclass(frozen=True, kw_only=True)
class DestroyWeightsUpdateGroup(Message):
    group_name: str = "weight_update_group"


@dataclass(frozen=True, kw_only=True)
class UpdateWeightsFromDistributed(Message):
    """Receive one bucket, broadcast by rank 0 in the order of `names`.

    `load_format` "flattened_bucket": all of them as one tensor of bytes (see `weight_group`).
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
        counts = {len(self.names), len(self.dtypes), len(self.shapes)}
        if len(counts) != 1:
            raise ValueError(
                f"{len(self.names)} names, {len(self.dtypes)} dtypes, {len(self.shapes)} shapes: "
                "they have to be as many as each other"
            )
        _require(
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
        _require(
            self.action in get_args(CheckAction), "action", self.action, f"one of {', '.join(get_args(CheckAction))}"
        )
