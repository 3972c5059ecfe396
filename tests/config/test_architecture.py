"""The model's architecture: old and new config.json, MODEL_ARGS, and conflicts between them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from config_run import GLM4_TINY, ROOT, Run

from slime.config.architecture import config_of, hf_architecture
from slime.config.args import Args
from slime.config.parse import load_args
from slime.core.architecture import Architecture, RopeScaling

PLAN = ["--dry-run", "--num-rollout", "1", "--rollout-num-gpus", "1", "--n-samples-per-prompt", "2"]
PLAN += ["--rm-type", "deepscaler", "--label-key", "label"]


def model_args(name: str) -> list[str]:
    command = f'source scripts/models/{name}.sh; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    return subprocess.run(
        ["bash", "-euc", command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def planned(name: str) -> Args:
    return load_args([*PLAN, *model_args(name)])[0]


@pytest.mark.parametrize(
    ("name", "family", "millions", "tied"),
    [
        ("glm4-9B", "glm4", 9400.3, False),
        ("glm4-tiny", "glm4", 1.0, False),
        ("llama3.1-8B", "llama", 8030.3, False),
        ("llama3.2-1B", "llama", 1235.8, True),
        ("llama3.2-3B", "llama", 3212.7, True),
        ("qwen2.5-0.5B", "qwen2", 494.0, True),
        ("qwen2.5-1.5B", "qwen2", 1543.7, True),
        ("qwen2.5-3B", "qwen2", 3085.9, True),
        ("qwen2.5-7B", "qwen2", 7615.6, False),
        ("qwen3-0.6B", "qwen3", 596.0, True),
        ("qwen3-4B", "qwen3", 4022.5, True),
    ],
)
def test_scripts_describe_the_models(name: str, family: str, millions: float, tied: bool) -> None:
    arch = planned(name).architecture
    assert arch is not None
    assert (arch.family, arch.tied_embeddings) == (family, tied)
    assert arch.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    assert (arch.rotary_percent, arch.rotary_interleaved) == ((0.5, True) if family == "glm4" else (1.0, False))


TABLE = {
    # layers, hidden, MLP, heads, KV heads, head size, vocabulary, epsilon, rotary base, factor of RoPE scaling
    "glm4-9B": (40, 4096, 13696, 32, 2, 128, 151552, 1e-5, 1e4, None),
    "llama3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, 1e-5, 5e5, 8.0),
    "llama3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256, 1e-5, 5e5, 32.0),
    "llama3.2-3B": (28, 3072, 8192, 24, 8, 128, 128256, 1e-5, 5e5, 32.0),
    "qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 151936, 1e-6, 1e6, None),
    "qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 128, 151936, 1e-6, 1e6, None),
    "qwen2.5-3B": (36, 2048, 11008, 16, 2, 128, 151936, 1e-6, 1e6, None),
    "qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 152064, 1e-6, 1e6, None),
    "qwen3-0.6B": (28, 1024, 3072, 16, 8, 128, 151936, 1e-6, 1e6, None),
    "qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151936, 1e-6, 1e6, None),
}
"""The sizes in every published model's config.json, which its script must match."""
MIXTURES = ("glm4.5-106B-A12B", "qwen3-30B-A3B")
"""The scripts that tests/config/test_expert_rules.py checks."""
CONFIGS = {"glm4": "Glm4Config", "llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def published_config(name: str, arch: Architecture) -> dict[str, Any]:
    """Return config.json of the table's row, made by the family's config class in transformers."""
    import transformers

    layers, hidden, ffn, heads, groups, head, vocabulary, epsilon, base, factor = TABLE[name]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if factor is not None:
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    if arch.family == "glm4":
        rope["partial_rotary_factor"] = 0.5
    own = {"attention_bias": True} if arch.family == "glm4" else {}
    own |= {} if arch.family == "qwen2" else {"head_dim": head}
    return getattr(transformers, CONFIGS[arch.family])(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        rms_norm_eps=epsilon,
        rope_parameters=rope,
        max_position_embeddings=arch.max_position_embeddings,
        tie_word_embeddings=arch.tied_embeddings,
        **own,
    ).to_dict()


def test_the_table_has_every_script() -> None:
    tiny = ("glm4-tiny", "qwen3-moe-tiny")
    assert {path.stem for path in ROOT.glob("scripts/models/*.sh")} == {*TABLE, *MIXTURES, *tiny}


@pytest.mark.parametrize("name", TABLE)
def test_scripts_and_published_configs_agree(name: str, run: Run) -> None:
    """A real command line with the script's MODEL_ARGS and the model's config.json has no conflict."""
    arch = planned(name).architecture
    assert arch is not None
    assert arch.kv_channels == TABLE[name][5]
    (run.hf / "config.json").write_text(json.dumps(published_config(name, arch)))
    assert run.errors(*model_args(name)) == []
    assert run.args(*model_args(name)).architecture == run.args().architecture == arch
    # control: one number of the script is changed
    assert "--num-query-groups 1: " in run.error(*model_args(name), "--num-query-groups", "1")


def test_config_json_alone(run: Run) -> None:
    args = run.args()
    assert args.architecture == hf_architecture(GLM4_TINY)
    assert (args.num_layers, args.group_query_attention, args.untie_embeddings_and_output_weights) == (4, True, True)


def test_script_and_config_agree(run: Run) -> None:
    assert run.errors(*model_args("glm4-tiny")) == []
    assert run.args(*model_args("glm4-tiny")).architecture == run.args().architecture


def test_older_keys_mean_the_same() -> None:
    older: dict[str, Any] = {**GLM4_TINY, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    del older["rope_parameters"]
    assert hf_architecture(older) == hf_architecture(GLM4_TINY)
    assert hf_architecture({**older, "rope_theta": 5e6}).rotary_base == 5e6
    assert hf_architecture({**older, "partial_rotary_factor": 1.0}).rotary_percent == 1.0


def test_configs_that_transformers_writes(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_key_value_heads=8, tie_word_embeddings=True
    )
    qwen.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    qwen.save_pretrained(tmp_path)
    arch = hf_architecture(json.loads((tmp_path / "config.json").read_text()))
    assert (arch.family, arch.rotary_base, arch.tied_embeddings, arch.qk_layernorm) == ("qwen3", 1e6, True, True)
    assert (arch.num_query_groups, arch.kv_channels, arch.add_qkv_bias) == (8, 128, False)


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA: dict[str, Any] = {**GLM4_TINY, "model_type": "llama", "attention_bias": False, "rope_parameters": LLAMA3}


def test_llama_of_older_and_newer_keys() -> None:
    arch = hf_architecture(LLAMA)
    assert (arch.family, arch.add_qkv_bias, arch.qk_layernorm, arch.post_mlp_layernorm) == (
        "llama",
        False,
        False,
        False,
    )
    assert (arch.rotary_base, arch.rotary_percent, arch.rotary_interleaved) == (500000, 1.0, False)
    assert arch.rope_scaling == RopeScaling(factor=32.0)
    older = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    del older["rope_parameters"], older["rope_scaling"]["rope_type"], older["rope_scaling"]["rope_theta"]
    assert hf_architecture(older) == arch
    assert hf_architecture({**older, "rope_scaling": None}) == replace(arch, rope_scaling=None)


def test_sizes_that_config_json_leaves_out() -> None:
    """The defaults are transformers': 128 in GLM-4 and Qwen3, hidden size / heads in Llama and Qwen2."""
    for family, head in {"glm4": 128, "qwen3": 128, "llama": 32, "qwen2": 32}.items():
        config = {**GLM4_TINY, "model_type": family, "attention_bias": False}
        assert hf_architecture({**config, "head_dim": None}).kv_channels == head
        del config["head_dim"], config["num_key_value_heads"], config["attention_bias"]
        arch = hf_architecture(config)
        assert (arch.kv_channels, arch.num_query_groups) == (head, 4)
        assert arch.add_qkv_bias == (family in ("glm4", "qwen2"))


def test_a_sliding_window_without_layers_is_ignored() -> None:
    qwen = {**GLM4_TINY, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 4}
    for more in ({"use_sliding_window": False}, {"use_sliding_window": True}):
        assert hf_architecture({**qwen, **more}) == hf_architecture({**GLM4_TINY, "model_type": "qwen2"})


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["--rotary-scaling-factor", "8"],
            "--rotary-scaling-factor 8: {hf}/config.json has --rotary-scaling-factor 32;",
        ),
        (["--no-use-rope-scaling"], "--no-use-rope-scaling: {hf}/config.json has --use-rope-scaling;"),
        (["--add-qkv-bias"], "--add-qkv-bias: {hf}/config.json has --no-add-qkv-bias;"),
    ],
)
def test_conflict_with_llama(run: Run, words: list[str], error: str) -> None:
    (run.hf / "config.json").write_text(json.dumps(LLAMA))
    assert run.error(*words).startswith(error.format(hf=run.hf))
    agreeing = run.args("--use-rope-scaling", "--rotary-scaling-factor", "32")
    assert agreeing.architecture == run.args().architecture == hf_architecture(LLAMA)
    assert (run.args().use_rope_scaling, run.args().rotary_scaling_factor) == (True, 32.0)


def test_scaling_that_config_json_does_not_have(run: Run) -> None:
    assert "config.json has --no-use-rope-scaling;" in run.error("--use-rope-scaling")
    assert "config.json has --no-use-rope-scaling;" in run.error("--use-rope-scaling", "--rotary-scaling-factor", "32")
    assert run.error("--rotary-scaling-factor", "32") == (
        "--rotary-scaling-factor 32: this model has no RoPE scaling; add --use-rope-scaling, or leave the flag out"
    )
    assert (run.args().use_rope_scaling, run.args().rotary_scaling_factor) == (False, None)


def test_scaling_can_be_overridden(run: Run) -> None:
    def scaling(*words: str) -> RopeScaling | None:
        arch = run.args(*words).architecture
        assert arch is not None
        return arch.rope_scaling

    on = ("--use-rope-scaling", "--override-hf-config", "use-rope-scaling")
    assert scaling(*on) == RopeScaling()
    assert scaling(*on, "--rotary-scaling-factor", "32") == RopeScaling(factor=32.0)
    (run.hf / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}))
    factor = ("--rotary-scaling-factor", "8", "--override-hf-config", "rotary-scaling-factor")
    assert scaling(*factor) == RopeScaling(factor=8.0, low_freq_factor=2.0)
    assert scaling("--no-use-rope-scaling", "--override-hf-config", "use-rope-scaling") is None


def test_flags_identify_the_family() -> None:
    sizes = ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "96", "--num-attention-heads", "4"]
    sizes += ["--vocab-size", "93"]

    def family(*words: str) -> str | None:
        arch = load_args([*PLAN, *sizes, *words])[0].architecture
        return None if arch is None else arch.family

    sandwich = ["--post-self-attn-layernorm", "--post-mlp-layernorm"]
    assert family() == "llama"
    assert family("--add-qkv-bias") == "qwen2"
    assert family("--qk-layernorm", "--no-add-qkv-bias") == "qwen3"
    assert family(*sandwich) == family(*sandwich, "--add-qkv-bias") == "glm4"
    for nobody in (["--add-qkv-bias", "--qk-layernorm"], [*sandwich, "--qk-layernorm"], sandwich[:1]):
        assert family(*nobody) is None
        assert any("match no supported family" in str(p) for p in load_args([*PLAN, *sizes, *nobody])[1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--rotary-base", "5000"], "--rotary-base 5000: {hf}/config.json has --rotary-base 10000;"),
        (["--num-layers", "3"], "--num-layers 3: {hf}/config.json has --num-layers 4;"),
        (["--norm-epsilon", "1e-6"], "--norm-epsilon 1e-06: {hf}/config.json has --norm-epsilon 1e-05;"),
        (["--qk-layernorm"], "--qk-layernorm: {hf}/config.json has --no-qk-layernorm;"),
        (
            ["--no-untie-embeddings-and-output-weights"],
            "--no-untie-embeddings-and-output-weights: {hf}/config.json has --untie-embeddings-and-output-weights;",
        ),
    ],
)
def test_conflict(run: Run, words: list[str], error: str) -> None:
    assert run.error(*words).startswith(error.format(hf=run.hf))


@pytest.mark.parametrize("name", ["rotary-base", "--rotary-base", "rotary_base"])
def test_override(run: Run, name: str) -> None:
    # A value that starts with dashes must be attached with =.
    args = run.args("--rotary-base", "5000", f"--override-hf-config={name}")
    assert args.architecture is not None
    assert args.architecture.rotary_base == 5000
    assert run.error("--rotary-base", "5000", "--override-hf-config", "rotary-percent") != ""
    assert "is not an architecture flag" in run.error("--override-hf-config", "lr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not one of glm4, glm4_moe, llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "RoPE of type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "its config.json has no 'low_freq_factor'"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "RoPE of type llama3 needs"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, "sliding-window attention"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
            "sliding-window attention",
        ),
    ],
)
def test_unsupported_models(run: Run, change: dict[str, Any], message: str) -> None:
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY | change))
    assert message in run.error()
    assert any(message in warning for warning in run.warnings("--dry-run"))


def test_broken_config(run: Run) -> None:
    (run.hf / "config.json").write_text("{")
    assert run.error().startswith(f"--hf-checkpoint {run.hf}: ")
    (run.hf / "config.json").write_text(json.dumps({"model_type": "glm4"}))
    assert "its config.json has no 'num_hidden_layers'" in run.error()


OLD_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 93,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "torch_dtype": "bfloat16",
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, **vars(RopeScaling(factor=32.0))}


@pytest.mark.parametrize(
    "config",
    [
        OLD_LLAMA,
        {**OLD_LLAMA, "rope_scaling": {name: LLAMA3_ROPE[name] for name in LLAMA3_ROPE if name != "rope_theta"}},
        {**OLD_LLAMA, "rope_parameters": LLAMA3_ROPE},
        {**OLD_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary_base": 1e6},
        {"rope_scaling": RopeScaling(factor=4.0)},
        {"rope_scaling": None},
        {"max_position_embeddings": 1024, "norm_epsilon": 1e-6, "kv_channels": 32, "tied_embeddings": True},
    ],
    ids=str,
)
def test_an_export_describes_what_was_trained(config: dict[str, Any], changes: dict[str, Any]) -> None:
    trained = replace(hf_architecture(config), **changes)
    found, unsaid = config_of(trained, config)
    assert hf_architecture(found) == trained and not unsaid
    assert found["torch_dtype"] == "bfloat16"
    if not changes:
        assert found == config
    elif trained != hf_architecture(config):
        assert found != config


def test_flags_that_config_json_cannot_express_are_named() -> None:
    trained = replace(hf_architecture(OLD_LLAMA), rotary_interleaved=True)
    assert config_of(trained, OLD_LLAMA)[1] == ["--rotary-interleaved"]
