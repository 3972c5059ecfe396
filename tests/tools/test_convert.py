"""HF -> torch_dist -> HF by the tools, bit for bit, also through a run at tensor parallel size 2."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4Config, Glm4ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from worker_pool import WorkerPool, joined

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.args import Args
from slime.megatron.checkpoint.files import find_checkpoint
from slime.models.hf_files import HFReader
from tools import convert_torch_dist_to_hf

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
GLM4_ARGS = """
    --swiglu --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --kv-channels 16 --vocab-size 93 --normalization RMSNorm --norm-epsilon 1e-5
    --disable-bias-linear --add-qkv-bias --post-self-attn-layernorm --post-mlp-layernorm
    --untie-embeddings-and-output-weights --position-embedding-type rope --rotary-percent 0.5 --rotary-interleaved
"""


def make_hf(path: Path, family: str, dtype: torch.dtype) -> Path:
    sizes: dict[str, Any] = {
        "vocab_size": 93,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": family == "qwen3-tied",
    }
    if family == "glm4":
        model = Glm4ForCausalLM(Glm4Config(**sizes, attention_bias=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.to(dtype).save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def weights(path: Path) -> dict[str, Tensor]:
    reader = HFReader(path)
    return {name: reader.get(name) for name in reader.names()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def run_tool(name: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / name), *map(str, argv)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def converted(rank: int, world_size: int, init_method: str, args: Args, hf: Path, save: Path) -> Path:
    from slime.megatron.checkpoint.conversion import hf_to_torch_dist

    return hf_to_torch_dist(args, hf, save)


def back(rank: int, world_size: int, init_method: str, args: Args, load: Path, hf: Path, out: Path) -> None:
    """Convert back as the tool does, inside a run of any parallel size."""
    from slime.megatron.checkpoint.save_load import load_checkpoint
    from slime.megatron.model.build import build_model
    from slime.megatron.model.hf_weights import save_hf

    assert args.architecture is not None
    found = find_checkpoint(load)
    assert found is not None
    with joined(args, rank, world_size, init_method):
        model = build_model(args, wrap=False)
        load_checkpoint(found, model=model)
        save_hf(out, model, args.architecture, hf)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["glm4", "qwen3", "qwen3-tied"])
def test_round_trip(workers: WorkerPool, tmp_path: Path, family: str, dtype: torch.dtype, tp_size: int):
    hf = make_hf(tmp_path / "hf", family, dtype)
    args = Args(
        architecture=hf_architecture(read_hf_config(hf)),
        tensor_model_parallel_size=tp_size,
        sequence_parallel=tp_size > 1,
        bf16=dtype is torch.bfloat16,
    )
    workers.run(1, converted, args, hf, tmp_path / "dist")
    workers.run(tp_size, back, args, tmp_path / "dist", hf, tmp_path / "out")
    original = weights(hf)
    assert_same_bits(weights(tmp_path / "out"), original)
    next(iter(original.values())).view(torch.uint8).view(-1)[0] ^= 1
    with pytest.raises(AssertionError):
        assert_same_bits(weights(tmp_path / "out"), original)


def test_the_tools_as_documented(tmp_path: Path):
    hf = make_hf(tmp_path / "hf", "glm4", torch.bfloat16)
    there = run_tool(
        "convert_hf_to_torch_dist.py", *GLM4_ARGS.split(), "--hf-checkpoint", hf, "--save", tmp_path / "dist"
    )
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "dist" / "latest_checkpointed_iteration.txt").read_text() == "release"
    again = run_tool(
        "convert_torch_dist_to_hf.py",
        *("--input-dir", tmp_path / "dist", "--origin-hf-dir", hf, "--output-dir", tmp_path / "out"),
    )
    assert again.returncode == 0, again.stderr
    assert_same_bits(weights(tmp_path / "out"), weights(hf))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


def tool_main(name: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the tools do, and undone after the test
    hf = make_hf(tmp_path / "hf", "glm4", torch.bfloat16)
    convert, convert_back = tool_main("convert_hf_to_torch_dist"), tool_main("convert_torch_dist_to_hf")
    with pytest.raises(ValueError, match=r"--hf-checkpoint and --save: .* give both"):
        convert(["--hf-checkpoint", str(hf)])
    with pytest.raises(ValueError, match=r"--num-layers 3: .*config.json has --num-layers 2"):
        convert(["--num-layers", "3", "--hf-checkpoint", str(hf), "--save", str(tmp_path / "dist")])
    with pytest.raises(ValueError, match="--sav: unknown flag; did you mean --save"):
        convert(["--hf-checkpoint", str(hf), "--sav", str(tmp_path / "dist")])
    assert not (tmp_path / "dist").exists()
    with pytest.raises(ValueError, match=r"--input-dir .*/dist: no torch_dist checkpoint there"):
        convert_back(
            ["--input-dir", str(tmp_path / "dist"), "--origin-hf-dir", str(hf), "--output-dir", str(tmp_path / "out")]
        )


class Touches:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._path), "w")


def test_a_harmful_directory_is_refused_by_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hf, release, marker = make_hf(tmp_path / "hf", "glm4", torch.bfloat16), tmp_path / "in/release", tmp_path / "marker"
    release.mkdir(parents=True)
    for name in ("metadata.json", "common.pt"):
        (release / name).write_text("{}")
    (release / ".metadata").write_bytes(pickle.dumps(Touches(marker)))
    given = ["--origin-hf-dir", str(hf), "--output-dir", str(tmp_path / "out")]
    for path in (release, release.parent):
        with pytest.raises(
            ValueError, match=rf"{release}/\.metadata: holds io\.open, which neither torch nor Megatron"
        ):
            convert_torch_dist_to_hf.main(["--input-dir", str(path), *given])
    assert not marker.exists() and not (tmp_path / "out").exists()
