from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from slime.config.architecture import hf_architecture, read_hf_config
from slime.core.architecture import RopeScaling
from slime.engine.embedded.settings import Settings, parse_settings


def parse(path: Path, *flags: str) -> Settings:
    return parse_settings(["--model-path", str(path), "--port", "1", *flags])[0]


def test_most_settings_come_from_the_model_directory(model_dirs: dict[str, Path]) -> None:
    settings = parse(model_dirs["glm4"])
    assert (settings.dtype, settings.context_length, settings.stop_token_ids) == (torch.float32, 512, frozenset())
    assert settings.architecture.rotary_interleaved
    assert settings.host == "127.0.0.1"
    assert parse(model_dirs["glm4-bf16"]).dtype == torch.bfloat16
    assert parse(model_dirs["glm4-bf16"], "--dtype", "float32").dtype == torch.float32


def test_eos_ids_of_both_files_end_a_response(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((model_dirs["glm4"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert parse(tmp_path).stop_token_ids == {5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert parse(tmp_path).stop_token_ids == {5, 6, 7}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--context-length", "513"], "--context-length is 513"),
        (["--max-total-tokens", "256", "--context-length", "300"], "raise --max-total-tokens"),
        (["--max-total-tokens", "3"], "--max-total-tokens is 3"),
    ],
)
def test_an_impossible_setting_is_an_error(flags: list[str], words: str, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=words):
        parse(model_dirs["glm4"], *flags)


def test_an_unknown_family_is_an_error(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((model_dirs["glm4"] / "config.json").read_text())
    arch = asdict(hf_architecture(config))
    with pytest.raises(ValueError, match=r"'mamba'; this engine serves glm4, .*qwen3_moe"):
        parse(model_dirs["glm4"], "--architecture", json.dumps({**arch, "family": "mamba"}))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ValueError, match="model_type 'mamba' is not one of"):
        parse(tmp_path)


def test_the_command_lines_architecture_replaces_the_files(model_dirs: dict[str, Path]) -> None:
    arch = replace(hf_architecture(read_hf_config(model_dirs["llama3"])), rope_scaling=RopeScaling(factor=2.0))
    assert parse(model_dirs["llama3"], "--architecture", json.dumps(asdict(arch))).architecture == arch
    assert parse(model_dirs["llama3"]).architecture != arch


def test_a_directory_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a Hugging Face directory"):
        parse(tmp_path)
