"""Random checkpoints of the families: names, shapes and files on which transformers and the weight tables agree."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slime.config.architecture import hf_architecture, read_hf_config
from slime.core.architecture import Architecture, RopeScaling
from slime.models.families import weight_table
from slime.models.hf_files import HFReader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools import make_random_checkpoint as tool  # noqa: E402

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "norm_epsilon": 1e-6,
    "rotary_base": 50000.0,
}
MIXTURE: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}
SHAPES = {
    "glm4": Architecture(
        **SMALL | {"kv_channels": 32},
        family="glm4",
        rotary_percent=0.5,
        rotary_interleaved=True,
        add_qkv_bias=True,
        post_self_attn_layernorm=True,
        post_mlp_layernorm=True,
    ),
    "qwen2": Architecture(**SMALL, family="qwen2", add_qkv_bias=True, tied_embeddings=True),
    "qwen3": Architecture(**SMALL | {"kv_channels": 32}, family="qwen3", qk_layernorm=True),
    "glm4_moe": Architecture(
        **SMALL | {"num_layers": 3},
        **MIXTURE,
        family="glm4_moe",
        rotary_percent=0.5,
        add_qkv_bias=True,
        first_dense_layers=2,
        shared_expert_ffn_hidden_size=48,
        router_score="sigmoid",
        router_bias=True,
        routed_scaling_factor=2.5,
    ),
    "qwen3_moe": Architecture(
        **SMALL | MIXTURE, family="qwen3_moe", qk_layernorm=True, first_dense_layers=1, norm_topk_prob=False
    ),
    "llama": Architecture(**SMALL, family="llama", rope_scaling=RopeScaling(factor=32.0), tied_embeddings=True),
}


@pytest.mark.parametrize("family", SHAPES)
def test_the_directory_is_a_model(family: str, tmp_path: Path) -> None:
    arch, out = SHAPES[family], tmp_path / "out"
    tool.make_checkpoint(arch, out, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hf_architecture(read_hf_config(out)) == arch

    reader = HFReader(out)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    expected = dict(model.state_dict())
    if arch.tied_embeddings:
        del expected["lm_head.weight"]
    # loading below shows that a layer's experts have these names in files
    expected = dict(own for name, tensor in expected.items() for own in tool.in_file(name, tensor.shape))
    assert {name: reader.get(name).shape for name in reader.names()} == expected
    assert reader.dtypes() == {torch.bfloat16}

    table = weight_table(arch)
    back = {k: v for m in table.megatron_names() for k, v in table.to_hf(m, table.from_hf(m, reader.get))}
    assert back.keys() == expected.keys()
    assert all(torch.equal(tensor, reader.get(name)) for name, tensor in back.items())

    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    logits = loaded(torch.arange(64)[None]).logits.float().detach()
    # the last norm gives vectors of RMS 1, and the output layer's entries have a standard deviation of 0.02
    assert logits.std().item() == pytest.approx(tool.STD * math.sqrt(arch.hidden_size), rel=0.3)


def test_values(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        tool.make_checkpoint(SHAPES["glm4"], tmp_path / name, seed=seed, dtype=torch.float32)
    a, b, c = (HFReader(tmp_path / name) for name in "abc")
    names = a.names()
    assert all(torch.equal(a.get(name), b.get(name)) for name in names)
    matrices = [name for name in names if a.get(name).ndim == 2]
    assert not any(torch.equal(a.get(name), c.get(name)) for name in matrices)
    query, key = (a.get(f"model.layers.{layer}.self_attn.q_proj.weight") for layer in (0, 1))
    assert not torch.equal(query, key)
    for name in matrices:
        assert a.get(name).std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(a.get(name).mean().item()) < 0.002
    for name in set(names) - set(matrices):
        assert (a.get(name) == (0 if name.endswith("bias") else 1)).all(), name


def test_the_tokenizer(tmp_path: Path) -> None:
    tool.make_checkpoint(SHAPES["qwen3"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Grüße, 2+2=4\n\t<think>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) <= SHAPES["qwen3"].vocab_size
    chat = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.decode(prompt) == "<|user|>\nhi<|assistant|>\n"
    assert prompt[0] == tokenizer.eos_token_id
    # a random model samples ids that no token has
    assert tokenizer.decode([ids[0], 299, ids[1]]) == "Gr"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]


def test_from_a_script_and_from_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.sh").write_text(
        (ROOT / "scripts/models/glm4-tiny.sh").read_text() + "MODEL_ARGS+=(--vocab-size 512)\n"
    )
    tool.main(["--from-args", str(tmp_path / "model.sh"), "--out", str(tmp_path / "a"), "--num-layers", "3"])
    assert "glm4, 3 layers" in capsys.readouterr().out
    config = str(tmp_path / "a" / "config.json")
    tool.main(["--config", config, "--out", str(tmp_path / "b"), "--num-layers", "1", "--dtype", "float32"])
    first, second = (hf_architecture(read_hf_config(tmp_path / name)) for name in "ab")
    assert (first.num_layers, second.num_layers, first.vocab_size) == (3, 1, 512)
    assert HFReader(tmp_path / "b").dtypes() == {torch.float32}


@pytest.mark.parametrize("script", ["qwen3-0.6B", "qwen3-4B", "glm4-9B", "llama3.2-1B", "qwen2.5-7B"])
def test_true_sizes_have_configs(script: str) -> None:
    """No weights are made here; `hf_config` itself checks that the config expresses the whole architecture."""
    arch = tool.shape_of_script(ROOT / "scripts/models" / f"{script}.sh", None)
    assert tool.hf_config(arch).num_hidden_layers == arch.num_layers


def test_impossible_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no room for the tokenizer's 261"):
        tool.main(["--from-args", str(ROOT / "scripts/models/glm4-tiny.sh"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="cannot read MODEL_ARGS"):
        tool.main(["--from-args", str(tmp_path / "none.sh"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"other\.json: is neither a directory nor called config\.json"):
        tool.main(["--config", str(tmp_path / "other.json"), "--out", str(tmp_path / "out")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not a Hugging Face directory"):
        tool.make_checkpoint(SHAPES["qwen3"], tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
