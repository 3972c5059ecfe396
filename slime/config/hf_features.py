"""Keys of a config.json: those that ask for what no layer here computes are refused by name.

Path: `architecture.hf_architecture` calls `refuse_unknown` before it reads the shape. Invariant: a key that the code of
a family reads for its logits, in transformers or in SGLang, is a field of Architecture, or has a value here at which it
changes nothing, and every other value is refused. Of the other keys some are known to have no effect on logits
(`NO_EFFECT`), and the rest is named in a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from slime.core.architecture import RopeScaling

QWEN = ("qwen2", "qwen3", "qwen3_moe")
"""Families with a switch for sliding windows."""

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    *("num_experts_per_tok", "decoder_sparse_step"),
)
"""Whole numbers above 0."""
OPEN_SIZES = ("num_key_value_heads", "head_dim", "n_group", "topk_group")
"""Whole numbers above 0, or null for the default."""
COUNTS = ("first_k_dense_replace", "n_shared_experts", "max_window_layers")
"""Whole numbers from 0 on."""
NUMBERS = (
    *("rms_norm_eps", "rope_theta", "routed_scaling_factor", "partial_rotary_factor"),
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
"""Numbers above 0, some of them among the keys of RoPE."""

NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "only silu is"),
    "mlp_bias": ((False, None), "biases in the MLP are not"),
    "is_causal": ((True, None), "attention to later tokens is not"),
    "use_bidirectional_attention": ((False, None), "attention to later tokens is not"),
    "is_encoder_decoder": ((False, None), "an encoder is not"),
    "add_cross_attention": ((False, None), "cross attention is not"),
    "attention_chunk_size": ((None,), "attention within chunks is not"),
    "dual_chunk_attention_config": ((None,), "dual chunk attention, which SGLang would use, is not"),
    "num_kv_shared_layers": ((0, None), "layers that share keys and values are not"),
    "attn_logit_softcapping": ((None,), "capped attention scores are not"),
    "final_logit_softcapping": ((None,), "capped logits, which SGLang would make, are not"),
    "bias": ((False, None), "biases of the attention, which SGLang would add, are not"),
    "scale_emb": ((1, None), "scaled embeddings, which SGLang would make, are not"),
    "rope_is_neox_style": ((True, None), "interleaved RoPE, which SGLang would use, is not, in this family,"),
    "original_num_attention_heads": (
        (None,),
        "a head size by another number of heads, which SGLang would take, is not",
    ),
    "pruned_heads": (({}, None), "pruned heads are not"),
}
"""Keys that are no field of Architecture: the values at which they change nothing, and why no others. Some are read by
SGLang alone, which then would sample from another model than the one that is trained."""

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
"""Keys that are read here, or elsewhere in slime."""
NO_EFFECT = frozenset(
    [
        # of training with transformers' own loop, of its generation, of its outputs
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
        # heads of other tasks, and weights beside the model's own
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "num_nextn_predict_layers"),
        # how it was made, and how it is run
        *("architectures", "auto_map", "name_or_path", "transformers_version", "pretraining_tp", "tokenizer_class"),
        *("attn_implementation", "experts_implementation", "torchscript", "tie_encoder_decoder", "is_decoder"),
    ]
)
"""Keys that logits do not depend on; tests/config/test_hf_features.py compares."""


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that are neither read, nor refused, nor known to have no effect."""
    known = HONOURED | NO_EFFECT | NEUTRAL.keys()
    return sorted(key for key, value in config.items() if key not in known and key[:1] != "_" and value is not None)


def refuse_unknown(config: Mapping[str, Any]) -> None:
    """Raise ValueError with everything in a config.json that is no value, or that is not built."""
    faults = [*_wrong_values(config)]
    if not faults:
        faults = [*_windows(config), *_features(config), *_rope(config)]
    if faults:
        raise ValueError("; ".join(faults))


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key in (*SIZES, *OPEN_SIZES, *COUNTS):
        least = 0 if key in COUNTS else 1
        value = config.get(key, least)
        if value is None and key in OPEN_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{key} {value!r} in config.json has to be a whole number from {least} on"
    places: list[tuple[str, Mapping[str, Any]]] = [("config.json", config)]
    for place in ("rope_parameters", "rope_scaling"):
        found = cast(object, config.get(place) or {})
        if isinstance(found, dict):
            places.append((f"{place} of config.json", cast(dict[str, Any], found)))
        else:
            yield f"{place} {found!r} in config.json has to be an object"
    for where, numbers in places:
        for key in NUMBERS:
            value = numbers.get(key, 1)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                yield f"{key} {value!r} in {where} has to be a number above 0"
    if not isinstance(config.get("layer_types") or [], list):
        yield f"layer_types {config['layer_types']!r} in config.json has to be a list"


def _windows(config: Mapping[str, Any]) -> Iterator[str]:
    """Layers that attend to a window alone, as each family's code decides it. Its size does not matter here.

    qwen2 and qwen3: with use_sliding_window, layers that layer_types names, else those from max_window_layers on.
    qwen3_moe: with use_sliding_window all layers, whatever the other keys are. The other families have no switch: there
    transformers' cache goes by sliding_window alone.
    """
    family = config["model_type"]
    types = cast(list[Any], config.get("layer_types") or [])
    window = config.get("sliding_window", 4096 if family in QWEN else None)
    if config.get("use_sliding_window", family not in QWEN) and window is not None:
        all_layers = family not in ("qwen2", "qwen3")
        named = "sliding_attention" in types if types else None
        if all_layers or (
            config.get("max_window_layers", 28) < config["num_hidden_layers"] if named is None else named
        ):
            yield f"sliding-window attention (sliding_window {window}) is not built"
            return
    others = sorted({str(kind) for kind in types if kind != "full_attention"})
    if others:
        kind = "sliding-window attention" if others == ["sliding_attention"] else "attention"
        yield f"{kind} by layer_types {', '.join(others)} is not built, only full_attention"


def _features(config: Mapping[str, Any]) -> Iterator[str]:
    family = config["model_type"]
    for key, (neutral, why) in NEUTRAL.items():
        value = config.get(key, neutral[0])
        if value not in neutral:
            yield f"{key} {value!r} is not built: {why}"
    if family in ("llama", "qwen3", "qwen3_moe") and config.get("attention_bias"):
        yield "attention_bias, in this family also a bias of the output projection, is not built"


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of RoPE: transformers 5's rope_parameters, or the older rope_scaling. Two that differ are refused."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope(config: Mapping[str, Any]) -> Iterator[str]:
    rope, older = rope_of(config), config.get("rope_scaling")
    by_layer = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if by_layer:
        yield f"RoPE that differs by kind of layer ({', '.join(by_layer)}) is not built"
    if older and older != rope:
        yield "rope_scaling and rope_parameters do not agree: leave one of them out"
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None and config[key] != rope.get(key, config[key]):
            yield (
                f"{key} {config[key]!r} does not agree with {rope[key]!r} among RoPE's keys: transformers takes the "
                "second, SGLang the first"
            )
    if config["model_type"] in ("glm4", "glm4_moe"):
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        if partial > 1:
            yield f"partial_rotary_factor {partial!r} has to be a share of a head"
        return
    # transformers rotates whole heads in these families, whatever this says; SGLang does as the key at the top says
    partial = config.get("partial_rotary_factor")
    if partial is None and rope.get("rope_type", "default") != "default":
        partial = rope.get("partial_rotary_factor")
    if partial not in (None, 1):
        yield f"partial_rotary_factor {partial!r} is not built in this family, only whole heads are rotated"


def rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of RoPE, from rope_parameters or rope_scaling; an older file has its type under `type`.

    Raises:
        ValueError: a type that is not built, or numbers that are none of it.
        KeyError: one of them is missing.
    """
    rope = rope_of(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ValueError(f"RoPE of type {rope_type!r} is not built, only the types default and llama3")
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor <= 0:
        raise ValueError(f"RoPE of type llama3 has to have 0 < factor and 0 < low < high_freq_factor: {dict(rope)}")
    return scaling
