"""Hugging Face directories: we read what transformers writes, transformers reads what we write, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from slime.models.hf_files import HFReader, is_hf_directory, write_hf


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def source(model: Qwen3ForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "source"
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_text(f"content of {name}")
    return path


@pytest.fixture
def sharded(model: Qwen3ForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    model.save_pretrained(path, max_shard_size="4KB")
    assert not (path / "model.safetensors").exists()
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    reader = HFReader(path)
    return {name: reader.get(name) for name in reader.names()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_single_and_sharded_files_hold_the_model(model: Qwen3ForCausalLM, source: Path, sharded: Path):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same(tensors_of(source), weights)
    assert_same(tensors_of(sharded), weights)
    weights["lm_head.weight"] += 1
    with pytest.raises(AssertionError):
        assert_same(tensors_of(sharded), weights)


@pytest.mark.parametrize("max_shard_bytes", [5 * 1024**3, 4096])
def test_transformers_reads_what_we_write(source: Path, tmp_path: Path, max_shard_bytes: int):
    target = tmp_path / "target"
    weights = tensors_of(source)
    write_hf(target, weights.items(), source, max_shard_bytes=max_shard_bytes)
    assert is_hf_directory(target)
    assert (target / "model.safetensors").exists() == (max_shard_bytes > 4096)
    assert_same(tensors_of(target), weights)
    read_back = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert_same(dict(read_back.state_dict()), weights)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_each_tensor_keeps_its_source_dtype(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    weights = {"a": torch.randn(3).to(torch.bfloat16), "b": torch.randn(3), "c": torch.randn(3).half()}
    save_file(weights, source / "model.safetensors")
    write_hf(tmp_path / "target", ((name, tensor.float()) for name, tensor in weights.items()), source)
    assert_same(tensors_of(tmp_path / "target"), weights)


def test_another_dtype_is_written_to_the_config(source: Path, tmp_path: Path):
    write_hf(tmp_path / "target", tensors_of(source).items(), source, torch.float32)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "target").values()} == {torch.float32}
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "float32"


def test_only_an_export_is_replaced(source: Path, tmp_path: Path):
    target = tmp_path / "target"
    weights = tensors_of(source)
    write_hf(target, weights.items(), source, max_shard_bytes=4096)
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    write_hf(target, changed.items(), source)
    assert_same(tensors_of(target), changed)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("")
    with pytest.raises(ValueError, match="photos exists and is not a Hugging Face directory"):
        write_hf(other, weights.items(), source)
    with pytest.raises(ValueError, match="is the source of the export"):
        write_hf(source, weights.items(), source)
    assert_same(tensors_of(source), weights)


def test_a_failed_export_leaves_the_old_one(source: Path, tmp_path: Path):
    target = tmp_path / "target"
    weights = tensors_of(source)
    write_hf(target, weights.items(), source)
    with pytest.raises(ValueError, match="has no tensor surprise"):
        write_hf(target, [*weights.items(), ("surprise", torch.zeros(1))], source)
    assert_same(tensors_of(target), weights)


def test_damage_is_named_with_its_file(source: Path, sharded: Path, tmp_path: Path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"source/model\.safetensors is damaged or cut short"):
        HFReader(source)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    name = next(name for name, file in HFReader(sharded)._file_of.items() if file == shard)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is listed in model\.safetensors\.index\.json but missing"):
        HFReader(sharded).get(name)
    save_file({"another": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name} has no usable tensor {name}"):
        HFReader(sharded).get(name)
    with pytest.raises(ValueError, match=r"has no tensor model\.nothing"):
        HFReader(sharded).get("model.nothing")
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        HFReader(sharded)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        HFReader(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "..", 7, None])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, file: object):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index"):
        HFReader(tmp_path)


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"[" * 100_000, b'{"weight_map": [1]}'])
def test_an_index_of_garbage_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index"):
        HFReader(tmp_path)
