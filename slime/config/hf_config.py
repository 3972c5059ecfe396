"""The reader of an HF directory's config.json, with a check of the type and range of every value that slime uses.

- Used by: `architecture`, which makes an Architecture of a config that passes.
- Invariant: a value of a wrong type is an error that names key and value; no computation uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slime.config.values import MAX_LAYERS, MOST
from slime.core.printable import printable
from slime.core.small_files import MEBIBYTE, read_json_object

MAX_CONFIG = 16 * MEBIBYTE
MAX_EXPERTS = 65_536


@dataclass(frozen=True)
class Kind:
    """A type of value: `check` returns whether a value has it, `what` describes it."""

    check: Callable[[Any], bool]
    what: str


def _whole(most: int, least: int = 1) -> Kind:
    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Kind(check, f"a whole number from {least} to {most}")


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < 1e30


def _all(kind: Kind, value: Any) -> bool:
    return isinstance(value, list) and all(kind.check(each) for each in cast(list[Any], value))


_SIZE = _whole(MOST)
_COUNT = _whole(MAX_EXPERTS, 0)
_TOKEN = _whole(MOST, 0)
_NUMBER = Kind(_is_positive, "a number above 0")
_SHARE = Kind(lambda value: _is_positive(value) and value <= 1, "a number above 0 and at most 1")
_SWITCH = Kind(lambda value: isinstance(value, bool), "true or false")
_TEXT = Kind(lambda value: isinstance(value, str), "text")
_OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
_LIST = Kind(lambda value: isinstance(value, list), "a list")
_LAYERS = Kind(lambda value: _all(_COUNT, value), "a list of layer numbers")
_TOKENS = Kind(lambda value: _TOKEN.check(value) or _all(_TOKEN, value), "a token id or a list of them")

REQUIRED: Mapping[str, Kind] = {
    "num_hidden_layers": _whole(MAX_LAYERS),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_attention_heads": _SIZE,
    "vocab_size": _SIZE,
    "max_position_embeddings": _SIZE,
    "rms_norm_eps": _NUMBER,
}
"""The required keys and the types of their values."""
OPTIONAL: Mapping[str, Kind] = {
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "rope_theta": _NUMBER,
    "partial_rotary_factor": _SHARE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "use_qk_norm": _SWITCH,
    "tie_word_embeddings": _SWITCH,
    "hidden_act": _TEXT,
    "use_sliding_window": _SWITCH,
    "sliding_window": _SIZE,
    "max_window_layers": _TOKEN,
    "layer_types": _LIST,
    "num_experts": _COUNT,
    "num_local_experts": _COUNT,
    "n_routed_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "n_shared_experts": _COUNT,
    "moe_intermediate_size": _SIZE,
    "first_k_dense_replace": _whole(MAX_LAYERS, 0),
    "decoder_sparse_step": _SIZE,
    "mlp_only_layers": _LAYERS,
    "norm_topk_prob": _SWITCH,
    "routed_scaling_factor": _NUMBER,
    "n_group": _COUNT,
    "topk_group": _COUNT,
    "eos_token_id": _TOKENS,
}
"""The optional keys and the types of their values."""
_NEVER_NULL = (
    *("rope_theta", "partial_rotary_factor", "max_window_layers", "num_experts", "num_local_experts"),
    *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"),
    *("first_k_dense_replace", "decoder_sparse_step", "routed_scaling_factor"),
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
"""Keys for which null does not mean the same as leaving them out."""
_ROPE: Mapping[str, Kind] = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_theta": _NUMBER,
    "partial_rotary_factor": _SHARE,
    "factor": _NUMBER,
    "low_freq_factor": _NUMBER,
    "high_freq_factor": _NUMBER,
    "original_max_position_embeddings": _SIZE,
}


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json of an HF directory. Raises OSError if there is none, ValueError if it is not a JSON object."""
    try:
        return read_json_object(Path(directory) / "config.json", MAX_CONFIG)
    except ValueError as error:
        raise ValueError(f"its config.json {error}") from error


def check_hf_config(config: Mapping[str, Any]) -> None:
    """Check the type of every value that slime reads from a config.json.

    Raises:
        ValueError: a value has a wrong type or is out of range.
        KeyError: a required key is missing.
    """
    for key, kind in REQUIRED.items():
        _check(key, config[key], kind)
    _check_given(config, OPTIONAL, "")
    for place in ("rope_parameters", "rope_scaling"):
        _check_given(cast(Mapping[str, Any], config.get(place) or {}), _ROPE, f"{place}.")


def _check_given(values: Mapping[str, Any], kinds: Mapping[str, Kind], place: str) -> None:
    for key, kind in kinds.items():
        if values.get(key) is not None or (key in values and key in _NEVER_NULL):
            _check(place + key, values[key], kind)


def _check(key: str, value: Any, kind: Kind) -> None:
    if not kind.check(value):
        raise ValueError(f"config.json has {key} {printable(repr(value))}, which is not {kind.what}")
