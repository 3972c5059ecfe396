"""Every key of config.json that transformers reads for a family's logits is part of the Architecture or refused.

The fields come from transformers' own config classes, so a field that a later version adds must be put into a table.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from config_run import GLM4_TINY, Run
from torch import Tensor

from slime.config.architecture import hf_architecture
from slime.config.hf_features import NO_EFFECT
from slime.models.families import FAMILIES

CLASSES: dict[str, Any] = {
    "glm4": transformers.Glm4Config,
    "glm4_moe": transformers.Glm4MoeConfig,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
OWN: dict[str, dict[str, Any]] = {
    "glm4": {"head_dim": 8, "attention_bias": False},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "norm_topk_prob": True},
}
OTHER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "is_encoder_decoder": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attention_bias": True,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 1,
    "num_experts": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.0,
    "n_group": 2,
    "topk_group": 2,
    "use_qk_norm": True,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "norm_topk_prob": False,
}
"""A changed value for every field that the logits depend on."""
WINDOWS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
"""Fields that have a meaning only together; test_sliding_windows checks them."""
INERT: dict[str, Any] = {
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "use_cache": False,
    "pretraining_tp": 2,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": 5,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "output_hidden_states": True,
    "return_dict": True,
    "dtype": "float32",
    "transformers_version": "4.0.0",
    "architectures": ["Other"],
    "chunk_size_feed_forward": 2,
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
}
"""A changed value for every field that the logits do not depend on."""


def tiny(family: str, **changes: Any) -> dict[str, Any]:
    """Return config.json of a tiny model as transformers writes it, with some keys changed."""
    torch.manual_seed(0)
    config = CLASSES[family](**SIZES, **OWN[family]).to_dict()
    return json.loads(json.dumps(config, default=str)) | changes


def logits(family: str, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Any:
    """Return the logits of transformers' own model, and its weights."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(CLASSES[family].from_dict(dict(config)))
    if weights is None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    else:
        model.load_state_dict(weights)
    tokens = torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits, model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_honoured_or_refused(family: str) -> None:
    config = tiny(family)
    arch = hf_architecture(config)
    fields = {field.name for field in dataclasses.fields(CLASSES[family])} - {"model_type"} - WINDOWS
    assert fields <= {*OTHER, *INERT}, "fields of a newer transformers: find out what they do"
    for name in sorted(fields & {*OTHER}):
        key = CLASSES[family].attribute_map.get(name, name)
        assert config[key] != OTHER[name], name
        try:
            changed = hf_architecture(config | {key: OTHER[name]})
        except ValueError as error:
            assert name in str(error) or name.split("_")[0] in str(error), (name, error)
        else:
            assert changed != arch, f"{name} is read by transformers, and ignored here"


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_keys_have_no_effect(family: str) -> None:
    """With every such field changed at once, the logits of transformers' own model stay bit-identical."""
    config = tiny(family)
    expected, weights = logits(family, config)
    fields = {field.name for field in dataclasses.fields(CLASSES[family])} & {*INERT}
    inert = {name: INERT[name] for name in fields}
    # this family always rotates whole heads, whatever its partial factor is
    if family not in ("glm4", "glm4_moe"):
        inert["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 0.5}
    found, _ = logits(family, config | inert, weights)
    assert torch.equal(found, expected)
    assert hf_architecture(config | inert) == hf_architecture(config)
    assert {*fields} - {"eos_token_id", "dtype"} <= NO_EFFECT
    control, _ = logits(family, config | {"rms_norm_eps": 1e-3}, weights)
    assert not torch.equal(control, expected)


EXTRA: dict[str, Any] = {
    "is_causal": False,
    "attention_chunk_size": 4,
    "sliding_window": 4,
    "partial_rotary_factor": 0.25,
    "final_logit_softcapping": 30.0,
    "dual_chunk_attention_config": {"chunk_size": 8},
    "scale_emb": 2.0,
    "bias": True,
    "rope_is_neox_style": False,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention"] * LAYERS,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    "head_dim": 16,
}
"""Keys that have no field in some family's config class, although its code, its cache or SGLang reads them."""


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_beyond_the_fields(family: str) -> None:
    config = {name: value for name, value in tiny(family).items() if name != "layer_types"}
    for name, value in EXTRA.items():
        switch = {"use_sliding_window": True, "max_window_layers": 0} if name == "sliding_window" else {}
        try:
            changed = hf_architecture(config | {name: value} | switch)
        except ValueError:
            continue
        assert changed != hf_architecture(config), name
    causal, weights = logits(family, config)
    assert not torch.equal(logits(family, config | {"is_causal": False}, weights)[0], causal)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_sliding_windows(family: str) -> None:
    """A window is refused exactly when transformers' logits depend on it, by each family's own rule."""
    config = tiny(family)
    for name in WINDOWS:
        config.pop(name, None)
    expected, weights = logits(family, config)
    verdicts: set[bool] = set()
    types = (None, ["full_attention"] * LAYERS, ["full_attention", "sliding_attention"])
    for uses, window, first, kinds in itertools.product((False, True), (None, 4), (0, LAYERS), types):
        keys = {"use_sliding_window": uses, "sliding_window": window, "max_window_layers": first, "layer_types": kinds}
        changed = config | {name: value for name, value in keys.items() if name != "layer_types" or value is not None}
        try:
            differs = not torch.equal(logits(family, changed, weights)[0], expected)
        except ValueError:  # layer_types names a window, but none is given
            differs = True
        try:
            hf_architecture(changed)
            refused = False
        except ValueError as error:
            refused = True
            assert "sliding-window attention" in str(error)
        named = kinds is not None and "sliding_attention" in kinds  # also refused in qwen3_moe, which ignores it
        assert refused == (differs or named), keys
        verdicts.add(refused)
    assert verdicts == {True, False}
    everywhere = hf_architecture_error({**config, "use_sliding_window": True, "max_window_layers": LAYERS})
    assert ("sliding_window 4096" in everywhere) == (family == "qwen3_moe")


def test_mistral_without_the_key_has_windows() -> None:
    """transformers takes a missing sliding_window for 4,096 tokens; null switches the windows off."""
    config = tiny("mistral")
    expected, weights = logits("mistral", config)
    assert hf_architecture(config) == dataclasses.replace(hf_architecture(tiny("llama")), family="mistral")
    assert not torch.equal(logits("mistral", config | {"sliding_window": 4}, weights)[0], expected)
    assert "sliding_window 4)" in hf_architecture_error(config | {"sliding_window": 4})
    del config["sliding_window"]
    assert transformers.MistralConfig(**config).sliding_window == 4096
    assert "sliding_window 4096)" in hf_architecture_error(config)


def hf_architecture_error(config: dict[str, Any]) -> str:
    try:
        hf_architecture(config)
    except ValueError as error:
        return str(error)
    return ""


def test_rope_in_two_places_has_to_agree() -> None:
    """With two lengths, or two fractions of a head, transformers would use one and SGLang the other."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama = tiny("llama", rope_parameters={**rope, "original_max_position_embeddings": 32})
    glm = tiny("glm4", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    for config, key, same in ((llama, "original_max_position_embeddings", 32), (glm, "partial_rotary_factor", 0.5)):
        assert hf_architecture(config | {key: same}) == hf_architecture(config)
        assert f"{key} 0.25 does not agree with {same}" in hf_architecture_error(config | {key: 0.25})
        of_theirs = CLASSES[config["model_type"]].from_dict(config | {key: 0.25}).rope_parameters[key]
        assert of_theirs == same
    older = {**rope, "rope_theta": 2e4}
    assert "rope_scaling and rope_parameters do not agree" in hf_architecture_error(llama | {"rope_scaling": older})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "4"}, "num_hidden_layers '4' in config.json must be a whole number from 1 on"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 in config.json must be a whole number from 1 on"),
        ({"hidden_size": None}, "hidden_size None in config.json"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small' in config.json must be a number above 0"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta None in rope_parameters of config.json"),
        ({"rope_parameters": [1]}, "rope_parameters [1] in config.json must be an object"),
        ({"layer_types": "full"}, "layer_types 'full' in config.json must be a list"),
    ],
)
def test_values_of_the_wrong_kind(run: Run, change: dict[str, Any], message: str) -> None:
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY | change))
    assert message in run.error()


@pytest.mark.parametrize("field", ["--ref-load", "--load", "--critic-load"])
def test_weights_of_another_model(run: Run, field: str) -> None:
    """Each directory's own config.json is read, because weights of equal shapes may need another computation."""
    other = run.directory / "other"
    shutil.copytree(run.hf, other)
    words = (field, str(other), *(("--advantage-estimator", "ppo") if field == "--critic-load" else ()))

    def problem(**change: Any) -> str:
        (other / "config.json").write_text(json.dumps(GLM4_TINY | change))
        errors = run.errors(*words)
        assert [text for text in run.warnings(*words, "--dry-run") if text.startswith(field)] == errors
        return "".join(errors)

    assert problem() == problem(max_position_embeddings=4096) == ""
    assert f"{field} {other}: its config.json has --norm-epsilon 0.01, and the model 1e-05" in problem(
        rms_norm_eps=0.01
    )
    assert "--rotary-base 500, and the model 10000" in problem(rope_parameters={"rope_theta": 500.0})
    assert "model_type llama, and the model is glm4" in problem(model_type="llama", attention_bias=False)
    assert "is_causal False is not supported" in problem(is_causal=False)
    meant = ("--norm-epsilon", "0.01", "--override-hf-config", "norm-epsilon")
    problem(rms_norm_eps=0.01)
    assert run.errors(*words, *meant) == []


def test_all_unsupported_and_unknown_keys_are_named(run: Run) -> None:
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY | {"is_causal": False, "hidden_act": "gelu"}))
    error = run.error()
    assert "is_causal False" in error and "hidden_act 'gelu'" in error
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY | {"wave_factor": 2.0, "_own": 1, "empty": None}))
    [warning] = [text for text in run.warnings() if "slime does not read" in text]
    assert "its config.json has keys that slime does not read: wave_factor;" in warning
