"""Quantized HF directories are refused by name everywhere, before anything starts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from config_run import GLM4_TINY, ROOT, Run

from slime.config.parse import UsageError
from slime.config.quantized import quantization, refuse_quantized
from slime.engine.embedded.settings import parse_settings

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
AT_TOP = {"quantization_config": FP8}
MESSAGE = "config.json has quantization_config (quant_method fp8), but quantized weights are not supported"


def described(run: Run, config: dict[str, Any], name: str = "hf") -> Path:
    """Return a copy of the run's HF directory with additional keys in its config.json."""
    copy = run.directory / name
    if not copy.exists():
        shutil.copytree(run.hf, copy)
    (copy / "config.json").write_text(json.dumps(GLM4_TINY | config))
    return copy


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("field", ["--hf-checkpoint", "--ref-load", "--load", "--critic-load"])
def test_every_directory_on_the_command_line(run: Run, field: str, more: list[str]) -> None:
    ppo = ["--advantage-estimator", "ppo"] if field == "--critic-load" else []
    plain = described(run, {}, "other")
    assert run.errors(field, str(plain), *ppo, *more) == []
    other = described(run, AT_TOP, "other")
    assert run.error(field, str(other), *ppo, *more) == (
        f"{field} {other}: {MESSAGE}; use the model's bf16 or fp32 release, or dequantize it first"
    )


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (AT_TOP, "config.json has quantization_config (quant_method fp8)"),
        ({"text_config": AT_TOP}, "config.json has text_config.quantization_config (quant_method fp8)"),
        (
            {"compression_config": {"format": "int-quantized"}},
            "config.json has compression_config (format int-quantized)",
        ),
        ({"quantization_config": {"bits": 4, "group_size": 128}}, "config.json has quantization_config (bits 4)"),
        ({"quantization_config": "awq"}, "config.json has quantization_config (awq)"),
        ({"quantization_config": {"odd": 1}}, "config.json has quantization_config (no method named)"),
    ],
)
def test_keys_of_config_json(run: Run, config: dict[str, Any], where: str) -> None:
    assert f"{where}, but quantized weights are not supported" in run.error(
        "--hf-checkpoint", str(described(run, config))
    )


@pytest.mark.parametrize(
    ("file", "text", "method"),
    [
        (
            "hf_quant_config.json",
            '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}',
            "NVFP4",
        ),
        ("quantize_config.json", '{"bits": 4, "desc_act": true}', "bits 4"),
        ("quant_config.json", '{"w_bit": 4}', "w_bit 4"),
        ("hf_quant_config.json", "{", "it cannot be read: is not JSON"),
    ],
)
def test_files_of_their_own(run: Run, file: str, text: str, method: str) -> None:
    (run.hf / file).write_text(text)
    error = run.error()
    assert f"there is {file} (" in error and method in error and "--hf-checkpoint" in error


def test_an_empty_description_passes(run: Run) -> None:
    for empty in (None, {}):
        described(run, {"quantization_config": empty, "text_config": {"quantization_config": empty}})
        assert quantization(run.hf) is None
        assert run.errors() == []
    (run.hf / "quantize_config.json").write_text("{}")
    assert run.errors() == []


def test_other_entry_points_refuse_them(run: Run, tmp_path: Path) -> None:
    """Both converters, the embedded engine and all code that reads weights refuse them."""
    described(run, AT_TOP)
    for tool, words in {
        "convert_hf_to_torch_dist": ["--hf-checkpoint", str(run.hf), "--save", str(tmp_path / "out")],
        "convert_torch_dist_to_hf": ["--input-dir", ".", "--origin-hf-dir", str(run.hf), "--output-dir", "out"],
    }.items():
        spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError) as caught:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tools set it
            module.main(words)
        assert [problem.rule for problem in caught.value.problems] == [MESSAGE]
    with pytest.raises(ValueError, match="quant_method fp8"):
        parse_settings(["--model-path", str(run.hf), "--port", "1"])
    with pytest.raises(ValueError, match="dequantize it first"):
        refuse_quantized(run.hf)
