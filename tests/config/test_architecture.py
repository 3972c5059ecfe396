"""The model's shape: config.json old and new, MODEL_ARGS, and what happens where they differ."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from config_run import GLM4_TINY, ROOT, Run

from slime.config.architecture import hf_architecture
from slime.config.args import Args
from slime.config.parse import load_args

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
        ("qwen3-0.6B", "qwen3", 596.0, True),
        ("qwen3-4B", "qwen3", 4022.5, True),
    ],
)
def test_scripts_describe_the_models(name: str, family: str, millions: float, tied: bool) -> None:
    shape = planned(name).architecture
    assert shape is not None
    assert (shape.family, shape.tied_embeddings) == (family, tied)
    assert shape.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    assert (shape.rotary_percent, shape.rotary_interleaved) == ((0.5, True) if family == "glm4" else (1.0, False))


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


def test_what_transformers_writes(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    qwen = transformers.Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_key_value_heads=8, tie_word_embeddings=True
    )
    qwen.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    qwen.save_pretrained(tmp_path)
    shape = hf_architecture(json.loads((tmp_path / "config.json").read_text()))
    assert (shape.family, shape.rotary_base, shape.tied_embeddings, shape.qk_layernorm) == ("qwen3", 1e6, True, True)
    assert (shape.num_query_groups, shape.kv_channels, shape.add_qkv_bias) == (8, 128, False)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--rotary-base", "5000"], "--rotary-base 5000: {hf}/config.json says --rotary-base 10000;"),
        (["--num-layers", "3"], "--num-layers 3: {hf}/config.json says --num-layers 4;"),
        (["--norm-epsilon", "1e-6"], "--norm-epsilon 1e-06: {hf}/config.json says --norm-epsilon 1e-05;"),
        (["--qk-layernorm"], "--qk-layernorm: {hf}/config.json says --no-qk-layernorm;"),
        (
            ["--no-untie-embeddings-and-output-weights"],
            "--no-untie-embeddings-and-output-weights: {hf}/config.json says --untie-embeddings-and-output-weights;",
        ),
    ],
)
def test_conflict(run: Run, words: list[str], error: str) -> None:
    assert run.error(*words).startswith(error.format(hf=run.hf))


@pytest.mark.parametrize("name", ["rotary-base", "--rotary-base", "rotary_base"])
def test_override(run: Run, name: str) -> None:
    # A value that starts with dashes is attached, as everywhere.
    args = run.args("--rotary-base", "5000", f"--override-hf-config={name}")
    assert args.architecture is not None
    assert args.architecture.rotary_base == 5000
    assert run.error("--rotary-base", "5000", "--override-hf-config", "rotary-percent") != ""
    assert "is no architecture flag" in run.error("--override-hf-config", "lr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not one of glm4, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "RoPE of type 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_not_built_models(run: Run, change: dict[str, Any], message: str) -> None:
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY | change))
    assert message in run.error()
    assert any(message in warning for warning in run.warnings("--dry-run"))


def test_broken_config(run: Run) -> None:
    (run.hf / "config.json").write_text("{")
    assert run.error().startswith(f"--hf-checkpoint {run.hf}: ")
    (run.hf / "config.json").write_text(json.dumps({"model_type": "glm4"}))
    assert "its config.json has no 'num_attention_heads'" in run.error()
