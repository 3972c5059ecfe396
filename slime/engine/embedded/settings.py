"""Settings of the embedded engine: its command line, and the values that follow from it.

- Used by: `kinds.embedded` writes the command line, and `server` reads it.
- Invariant: a flag that SGLang has as well means the same as there.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.end_tokens import end_token_ids
from slime.config.memory import EMBEDDED_ROW_STEP, EMBEDDED_RUNNING_REQUESTS
from slime.config.quantized import refuse_quantized
from slime.core.architecture import Architecture
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.text import Text
from slime.models.families import FAMILIES, family_names

CACHE_SHARE = 0.3
"""The share of the machine's free memory that the KV cache may fill."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, resolved; nothing is looked up later."""

    model_path: Path
    host: str
    port: int
    architecture: Architecture
    dtype: torch.dtype
    context_length: int
    """The most tokens of prompt and response together."""
    max_running_requests: int
    max_total_tokens: int
    """The number of cache positions that may be reserved at once."""
    stop_token_ids: frozenset[int]
    """The stop tokens of the model and of its tokenizer."""
    seed: int
    deterministic: bool
    """Whether a request's result does not depend on the other requests."""
    returns_routed_experts: bool
    """Whether the experts of tokens are kept, for requests that ask for them."""
    update_sessions: bool
    """Whether weights are taken only inside a weight-update session (as SGLang does from 0.5.21 on)."""
    api_key: str | None
    watchdog_timeout: float
    dist_timeout: float
    weight_version: str
    served_model_name: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slime.engine.embedded.server", allow_abbrev=False)
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="HF directory")
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--architecture", help="JSON of the model's shape; unset: from config.json")
    add(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: config.json's if it is bfloat16, else float32"
    )
    add("--context-length", type=int, help="tokens of prompt and response; unset: the model's own")
    add("--max-running-requests", type=int, default=EMBEDDED_RUNNING_REQUESTS)
    add("--max-total-tokens", type=int, help="cache positions; unset: what 30 %% of the free memory holds")
    add("--num-threads", type=int, default=1)
    add("--enable-deterministic-inference", action="store_true", help="results do not depend on other requests")
    add("--enable-return-routed-experts", action="store_true", help="keep the experts of tokens, for requests that ask")
    add("--no-update-sessions", action="store_true", help="weights come without sessions, as in SGLang before 0.5.21")
    add("--random-seed", type=int, help="for requests without a sampling_seed; unset: drawn")
    add("--api-key")
    add("--watchdog-timeout", type=float, default=300.0, help="seconds of one step after which /health fails")
    add("--dist-timeout", type=float, default=300.0, help="seconds for a weight group to join or to send")
    add("--weight-version", default="0")
    add("--served-model-name")
    return parser


def parse_settings(argv: Sequence[str]) -> tuple[Settings, int]:
    """Return the settings and the number of threads.

    Raises:
        ValueError: with flag, value, rule and remedy.
    """
    given = _parser().parse_args(argv)
    config = _read_config(given.model_path)
    arch = json.loads(given.architecture) if given.architecture else None
    architecture = hf_architecture(config) if arch is None else Architecture.from_dict(arch)
    if architecture.family not in FAMILIES:
        raise ValueError(
            f"--architecture names the family {architecture.family!r}; this engine serves {family_names()}"
        )
    if given.enable_return_routed_experts and not architecture.num_experts:
        raise ValueError(
            f"--enable-return-routed-experts: the {architecture.family} model at {given.model_path} has no experts; "
            "leave it out"
        )
    dtype = _dtype(given.dtype, config)
    total = given.max_total_tokens
    if total is None:
        free = psutil.virtual_memory().available * CACHE_SHARE
        total = int(free) // KVCache.bytes_per_token(architecture, dtype)
    total = total // EMBEDDED_ROW_STEP * EMBEDDED_ROW_STEP
    if total < EMBEDDED_ROW_STEP:
        raise ValueError(f"--max-total-tokens is {given.max_total_tokens}; it has to be at least {EMBEDDED_ROW_STEP}")
    longest = architecture.max_position_embeddings
    context = given.context_length or min(longest, total)
    if not 1 <= context <= min(longest, total):
        raise ValueError(
            f"--context-length is {context}; it has to lie in [1, {min(longest, total)}] "
            f"(the model's positions, and the cache's {total}): lower it or raise --max-total-tokens"
        )
    settings = Settings(
        model_path=given.model_path.resolve(),
        host=given.host,
        port=given.port,
        architecture=architecture,
        dtype=dtype,
        context_length=context,
        max_running_requests=given.max_running_requests,
        max_total_tokens=total,
        stop_token_ids=end_token_ids(given.model_path) | Text(given.model_path).end_token_ids,
        seed=given.random_seed if given.random_seed is not None else secrets.randbits(48),
        deterministic=given.enable_deterministic_inference,
        returns_routed_experts=given.enable_return_routed_experts,
        update_sessions=not given.no_update_sessions,
        api_key=given.api_key,
        watchdog_timeout=given.watchdog_timeout,
        dist_timeout=given.dist_timeout,
        weight_version=given.weight_version,
        served_model_name=given.served_model_name or str(given.model_path),
    )
    return settings, given.num_threads


def _read_config(path: Path) -> dict[str, Any]:
    try:
        refuse_quantized(path)
        return read_hf_config(path)
    except OSError as error:
        raise ValueError(f"--model-path {path}: {error}; name a Hugging Face directory") from error


def _dtype(name: str, config: Mapping[str, Any]) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    stored = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if stored == "bfloat16" else torch.float32
