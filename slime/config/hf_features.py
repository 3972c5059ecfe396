"""The check of config.json's keys: a key that requires a computation that slime does not have is refused by name.

- Used by: `architecture.hf_architecture`, which calls `refuse_unknown` before it reads the architecture.
- Invariant: if a family's code in transformers or SGLang reads a key to compute logits, the key is a field of
  Architecture, or all its values that would change logits are refused here. Other keys are known to have no effect on
  logits (`NO_EFFECT`) or are named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from slime.core.architecture import RopeScaling
from slime.models.family import Family

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    *("num_experts_per_tok", "decoder_sparse_step"),
)
"""Keys whose values are integers above 0."""
OPEN_SIZES = ("num_key_value_heads", "head_dim", "n_group", "topk_group")
"""Keys whose values are integers above 0, or null for the default."""
COUNTS = ("first_k_dense_replace", "n_shared_experts", "max_window_layers")
"""Keys whose values are integers from 0 on."""
NUMBERS = (
    *("rms_norm_eps", "rope_theta", "routed_scaling_factor", "partial_rotary_factor"),
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
"""Keys whose values are numbers above 0, some of them among the keys of RoPE."""

NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "the MLP uses silu"),
    "mlp_bias": ((False, None), "the MLP has no biases"),
    "is_causal": ((True, None), "attention to later tokens"),
    "use_bidirectional_attention": ((False, None), "attention to later tokens"),
    "is_encoder_decoder": ((False, None), "an encoder"),
    "add_cross_attention": ((False, None), "cross attention"),
    "attention_chunk_size": ((None,), "attention within chunks"),
    "dual_chunk_attention_config": ((None,), "dual chunk attention, which SGLang would use"),
    "num_kv_shared_layers": ((0, None), "layers that share keys and values"),
    "attn_logit_softcapping": ((None,), "capped attention scores"),
    "final_logit_softcapping": ((None,), "capped logits, which SGLang would compute"),
    "bias": ((False, None), "biases of the attention, which SGLang would add"),
    "scale_emb": ((1, None), "scaled embeddings, which SGLang would compute"),
    "rope_is_neox_style": ((True, None), "interleaved RoPE in this family, which SGLang would use"),
    "original_num_attention_heads": (
        (None,),
        "a head size from another number of heads, which SGLang would use",
    ),
    "pruned_heads": (({}, None), "pruned heads"),
}
"""Keys that are not fields of Architecture: the values that change nothing, and the feature that other values require.

Some keys are read only by SGLang, which would then sample from another model than the trained one.
"""

HONOURED = frozenset(
    [
        *SIZES,
        *OPEN_SIZES,
        *COUNTS,
        *NUMBERS,
        *("model_type", "attention_bias", "tie_word_embeddings", "use_qk_norm", "norm_topk_prob", "mlp_only_layers"),
        *("rope_parameters", "rope_scaling", "original_max_position_embeddings"),
        *("use_sliding_window", "sliding_window", "layer_types"),
        *("eos_token_id", "dtype", "torch_dtype", "quantization_config", "compression_config"),
    ]
)
"""Keys that slime reads."""
NO_EFFECT = frozenset(
    [
        # training with transformers' own loop, its generation and its outputs
        *("attention_dropout", "initializer_range", "router_aux_loss_coef", "output_router_logits", "use_cache"),
        *(
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "return_dict_in_generate",
            "chunk_size_feed_forward",
        ),
        *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "repetition_penalty"),
        # heads for other tasks, and additional weights
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "num_nextn_predict_layers"),
        # how the model was made and how it is run
        *("architectures", "auto_map", "name_or_path", "transformers_version", "pretraining_tp", "tokenizer_class"),
        *("attn_implementation", "experts_implementation", "torchscript", "tie_encoder_decoder", "is_decoder"),
    ]
)
"""Keys that logits do not depend on, which tests/config/test_hf_features.py verifies."""


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that are neither read, nor refused, nor known to have no effect."""
    known = HONOURED | NO_EFFECT | NEUTRAL.keys()
    return sorted(key for key, value in config.items() if key not in known and key[:1] != "_" and value is not None)


def refuse_unknown(config: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError with all wrong values and unsupported features in a config.json of this family."""
    faults = [*_wrong_values(config)]
    if not faults:
        faults = [*_windows(config, family), *_features(config, family), *_rope(config, family)]
    if faults:
        raise ValueError("; ".join(faults))


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key in (*SIZES, *OPEN_SIZES, *COUNTS):
        least = 0 if key in COUNTS else 1
        value = config.get(key, least)
        if value is None and key in OPEN_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{key} {value!r} in config.json must be a whole number from {least} on"
    places: list[tuple[str, Mapping[str, Any]]] = [("config.json", config)]
    for place in ("rope_parameters", "rope_scaling"):
        found = cast(object, config.get(place) or {})
        if isinstance(found, dict):
            places.append((f"{place} of config.json", cast(dict[str, Any], found)))
        else:
            yield f"{place} {found!r} in config.json must be an object"
    for where, numbers in places:
        for key in NUMBERS:
            value = numbers.get(key, 1)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                yield f"{key} {value!r} in {where} must be a number above 0"
    if not isinstance(config.get("layer_types") or [], list):
        yield f"layer_types {config['layer_types']!r} in config.json must be a list"


def _windows(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Yield faults if some layers use sliding-window attention, by the rules of the family's code (`Family.windows`).

    The window's size does not matter.
    'some layers': with use_sliding_window, the layers named in layer_types, or those from max_window_layers on.
    'all layers': with use_sliding_window, all layers, whatever the other keys are.
    'unswitched', 'unless null': transformers' cache depends on sliding_window only.
    """
    has_switch = family.windows in ("some layers", "all layers")
    types = cast(list[Any], config.get("layer_types") or [])
    window = config.get("sliding_window", None if family.windows == "unswitched" else 4096)
    if config.get("use_sliding_window", not has_switch) and window is not None:
        all_layers = family.windows != "some layers"
        named = "sliding_attention" in types if types else None
        if all_layers or (
            config.get("max_window_layers", 28) < config["num_hidden_layers"] if named is None else named
        ):
            yield f"sliding-window attention (sliding_window {window}) is not supported"
            return
    others = sorted({str(kind) for kind in types if kind != "full_attention"})
    if others:
        kind = "sliding-window attention" if others == ["sliding_attention"] else "attention"
        yield f"{kind} by layer_types {', '.join(others)} is not supported, only full_attention"


def _features(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    for key, (neutral, why) in NEUTRAL.items():
        value = config.get(key, neutral[0])
        if value not in neutral:
            yield f"{key} {value!r} is not supported: {why}"
    if family.refuses_attention_bias and config.get("attention_bias"):
        yield "attention_bias, in this family also a bias of the output projection, is not supported"


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of RoPE from transformers 5's rope_parameters or the older rope_scaling.

    A file in which both differ is refused elsewhere.
    """
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rotated_fraction(config: Mapping[str, Any]) -> float:
    """Return the fraction of a head that RoPE rotates, in a family where config.json decides it."""
    return rope_of(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))


def _rope(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    rope, older = rope_of(config), config.get("rope_scaling")
    by_layer = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if by_layer:
        yield f"RoPE that differs by type of layer ({', '.join(by_layer)}) is not supported"
    if older and older != rope:
        yield "rope_scaling and rope_parameters do not agree: leave one of them out"
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None and config[key] != rope.get(key, config[key]):
            yield (
                f"{key} {config[key]!r} does not agree with {rope[key]!r} among RoPE's keys: transformers uses the "
                "second, SGLang the first"
            )
    if family.partial_rotary:
        partial = rotated_fraction(config)
        if partial > 1:
            yield f"partial_rotary_factor {partial!r} must be a fraction of a head"
        return
    # In these families transformers always rotates whole heads, but SGLang follows the key at the top level.
    partial = config.get("partial_rotary_factor")
    if partial is None and rope.get("rope_type", "default") != "default":
        partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        yield f"partial_rotary_factor {partial!r} is not supported in this family, which rotates whole heads"


def rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """Return the RoPE scaling from rope_parameters or rope_scaling; older files have its type under `type`.

    Raises:
        ValueError: the type is not supported, or its numbers are out of range.
        KeyError: one of the numbers is missing.
    """
    rope = rope_of(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ValueError(f"RoPE of type {rope_type!r} is not supported, only the types default and llama3")
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor <= 0:
        raise ValueError(f"RoPE of type llama3 needs 0 < factor and 0 < low < high_freq_factor: {dict(rope)}")
    return scaling
