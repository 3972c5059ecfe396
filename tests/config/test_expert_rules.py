"""Mixtures of experts: config.json, MODEL_ARGS, and features that are not supported."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from config_run import Run
from test_architecture import PLAN, model_args, planned

from slime.config.architecture import config_of, hf_architecture
from slime.config.parse import load_args
from slime.plan.summary import format_plan

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "glm4.5-106B-A12B": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
}
BILLIONS = {"qwen3-30B-A3B": (30.53, 3.35), "glm4.5-106B-A12B": (106.85, 13.4)}
QWEN = PUBLISHED["qwen3-30B-A3B"]
GLM = PUBLISHED["glm4.5-106B-A12B"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_scripts_and_published_configs_agree(name: str, run: Run) -> None:
    (run.hf / "config.json").write_text(json.dumps(PUBLISHED[name]))
    arch, alone = hf_architecture(PUBLISHED[name]), planned(name).architecture
    assert alone is not None
    assert replace(alone, max_position_embeddings=arch.max_position_embeddings) == arch
    words = [*model_args(name), "--dry-run"]
    assert run.args(*words).architecture == arch
    assert (round(arch.num_parameters() / 1e9, 2), round(arch.num_active_parameters() / 1e9, 1)) == pytest.approx(
        BILLIONS[name], abs=0.06
    )
    # controls: numbers of the script are changed
    assert "has --moe-router-topk 8;" in run.error(*words, "--moe-router-topk", "4")
    assert "has --num-experts 128;" in run.error(*words, "--num-experts", "64")
    assert "--moe-layer-freq" in run.error(*words, "--moe-layer-freq", f"[0]*2+[1]*{arch.num_layers - 2}")


def test_layers() -> None:
    arch = hf_architecture(GLM)
    assert [arch.is_moe_layer(layer) for layer in (0, 1, 45)] == [False, True, True]
    assert (arch.num_moe_layers, hf_architecture(QWEN).num_moe_layers) == (45, 48)
    dense = replace(arch, num_experts=0)
    assert not dense.is_moe_layer(45) and dense.num_moe_layers == 0


def test_parameters_as_transformers_counts_them() -> None:
    import torch
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 93, "head_dim": 16, "moe_intermediate_size": 24}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    for config in (
        transformers.Qwen3MoeConfig(**sizes, num_experts=8, mlp_only_layers=[0], norm_topk_prob=True),
        transformers.Glm4MoeConfig(**sizes, n_routed_experts=8, n_shared_experts=2, attention_bias=True),
    ):
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)
        arch = hf_architecture(json.loads(config.to_json_string(use_diff=False)))
        assert arch.num_parameters() == sum(p.numel() for p in model.parameters())
        unused = arch.num_moe_layers * (8 - 2) * 3 * 64 * 24
        assert arch.num_parameters() - arch.num_active_parameters() == unused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "dense layers between layers of experts"),
        ({"mlp_only_layers": [3]}, "dense layers between layers of experts"),
        ({"mlp_only_layers": list(range(48))}, "none of its layers has experts"),
        ({"num_experts_per_tok": 200}, "experts per token cannot be chosen from"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_unsupported_experts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_architecture(QWEN | change)
    assert hf_architecture(QWEN | {"mlp_only_layers": [0, 1]}).first_dense_layers == 2


@pytest.mark.parametrize(
    ("name", "word"), [("qwen3-30B-A3B", "--qk-layernorm"), ("glm4.5-106B-A12B", "--moe-router-enable-expert-bias")]
)
def test_flags_identify_the_family_of_experts(name: str, word: str) -> None:
    args, problems = load_args([*PLAN, *(w for w in model_args(name) if w != word)])
    assert args.architecture is None
    assert any("match no supported family of experts" in str(problem) for problem in problems)


@pytest.mark.parametrize("config", [QWEN, GLM], ids=["qwen3_moe", "glm4_moe"])
def test_an_export_describes_what_was_trained(config: dict[str, Any]) -> None:
    trained = replace(
        hf_architecture(config), moe_router_topk=4, moe_ffn_hidden_size=256, shared_expert_ffn_hidden_size=0
    )
    if config is GLM:
        trained = replace(trained, routed_scaling_factor=2.5, shared_expert_ffn_hidden_size=256)
    found, unsaid = config_of(trained, config)
    assert hf_architecture(found) == trained and not unsaid


def moe_run(run: Run, config: dict[str, Any], *words: str) -> list[str]:
    (run.hf / "config.json").write_text(json.dumps(config))
    gpus = ("--actor-num-gpus-per-node", "4", "--rollout-num-gpus", "1", "--dry-run")
    return run.errors(*gpus, *words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--expert-model-parallel-size 4", None),
        ("--expert-model-parallel-size 3", "does not divide 128 experts"),
        ("--expert-model-parallel-size 8", "EP 8 x ETP 1 x PP 1 = 8 does not divide the 4 training GPUs"),
        ("--expert-tensor-parallel-size 5", "does not divide an expert's 1408 channels"),
        ("--tensor-model-parallel-size 2", "add --sequence-parallel"),
        ("--tensor-model-parallel-size 2 --sequence-parallel", None),
        ("--moe-router-dtype fp64", "routers compute in float32"),
        ("--moe-router-load-balancing-type seq_aux_loss", "the auxiliary loss is aux_loss"),
        ("--moe-expert-capacity-factor 1.5", "--moe-expert-capacity-factor 1.5: not part of this version"),
        ("--moe-permute-fusion", "it needs TransformerEngine"),
        ("--moe-router-pre-softmax --moe-grouped-gemm --moe-router-dtype fp32", None),
        ("--moe-shared-expert-overlap", None),
        ("--moe-shared-expert-overlap --recompute-modules shared_experts", "cannot be recomputed by itself"),
    ],
)
def test_rules_of_experts(words: str, error: str | None, run: Run) -> None:
    errors = moe_run(run, GLM, *words.split())
    if error is None:
        assert errors == []
    else:
        assert any(error in found for found in errors), errors


def test_balance_gives_warnings(run: Run) -> None:
    (run.hf / "config.json").write_text(json.dumps(QWEN))
    words = ("--moe-aux-loss-coeff", "0.01", "--moe-router-bias-update-rate", "0.001", "--dry-run")
    warnings = run.warnings(*words)
    assert any("depends on how a step is split into micro-batches" in warning for warning in warnings)
    assert any("the MoE routers of qwen3_moe have no bias" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpu-memory 79.6", "together, as grouped matrix products"),
        ("--gpu-memory 79.6 --no-moe-grouped-gemm", "one after the other; --moe-grouped-gemm runs them together"),
        (
            "--gpu-memory 79.6 --no-bf16 --sglang-dtype bfloat16",
            "torch's grouped matrix product takes bf16 only",
        ),
        ("", "one after the other: a CPU has no grouped matrix product"),
        ("--gpu-memory 79.6 --moe-ffn-hidden-size 1036", "2048 and 1036, are not all multiples of 8"),
    ],
)
def test_the_plan_names_how_experts_run(words: str, expected: str) -> None:
    args, problems = load_args([*PLAN, *model_args("qwen3-30B-A3B"), *words.split()])
    text = " ".join(format_plan(args, problems).split())
    assert expected in text


def test_overlap_without_a_shared_expert_is_noticed(run: Run) -> None:
    (run.hf / "config.json").write_text(json.dumps(QWEN))
    warnings = run.warnings("--moe-shared-expert-overlap", "--dry-run")
    assert any("no effect: qwen3_moe has no shared expert" in warning for warning in warnings)
