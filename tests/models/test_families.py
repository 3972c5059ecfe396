"""A model family is one file and one row: Seed-OSS is added here that way, and every part of slime then knows it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from slime.config.architecture import flags_architecture, hf_architecture, read_hf_config
from slime.config.parse import load_args
from slime.core.architecture import Architecture
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.models.decoder import pre_norm
from slime.models.families import FAMILIES, weight_table
from slime.models.family import Family, with_head_dim
from slime.models.hf_files import HFReader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools import make_random_checkpoint as tool  # noqa: E402

# What slime/models/seed_oss.py would contain. No other dense family has both flags, so they identify this one.
SEED_OSS = Family(
    model_type="seed_oss",
    transformers_class="SeedOss",
    rules=pre_norm,
    write=lambda arch: with_head_dim(arch) | {"attention_bias": False},
    flags=("--add-qkv-bias", "--qk-layernorm"),
)
SHAPE = Architecture(
    family="seed_oss",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=24,
    vocab_size=300,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e6,
)
FLAGS = ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "96", "--num-attention-heads", "4"]
FLAGS += ["--vocab-size", "300", "--add-qkv-bias", "--qk-layernorm", "--dry-run"]


@pytest.fixture
def seed_oss() -> Iterator[None]:
    """Add the row for Seed-OSS."""
    rows = cast(dict[str, Family], FAMILIES)
    rows["seed_oss"] = SEED_OSS
    yield
    del rows["seed_oss"]


def _engine_logits(model_dir: Path, tokens: list[int]) -> torch.Tensor:
    arch, reader = hf_architecture(read_hf_config(model_dir)), HFReader(model_dir)
    model = Model(arch)
    for name, target in model.weights.items():
        target.copy_(reader.get(name))
    cache = KVCache(arch, dtype=torch.float32, rows=1, tokens=64)
    cache.reserve(len(tokens), in_use=0)
    return model.logits(model.prefill([tokens], cache, 0)[0])


@pytest.mark.usefixtures("seed_oss")
def test_one_file_and_one_row_add_a_family(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool.make_checkpoint(SHAPE, out, dtype=torch.float32)
    assert hf_architecture(read_hf_config(out)) == SHAPE

    reader, table = HFReader(out), weight_table(SHAPE)
    table.check(table.megatron_names(), reader.names())
    back = {k: v for m in table.megatron_names() for k, v in table.to_hf(m, table.from_hf(m, reader.get))}
    assert back.keys() == set(reader.names())
    assert all(torch.equal(tensor, reader.get(name)) for name, tensor in back.items())

    theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = list(range(5, 25))
    expected = theirs(torch.tensor([tokens])).logits[0].detach()
    torch.testing.assert_close(_engine_logits(out, tokens), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_engine_logits(out, tokens[::-1]), expected, atol=1e-2)


@pytest.mark.usefixtures("seed_oss")
def test_flags_identify_the_added_family() -> None:
    args, _ = load_args(FLAGS, training=False)
    assert args.architecture is not None
    assert args.architecture.family == flags_architecture(args).family == "seed_oss"


def test_without_its_row_the_family_is_unknown() -> None:
    with pytest.raises(ValueError, match=f"'seed_oss' is not one of {', '.join(sorted(FAMILIES))}"):
        hf_architecture({"model_type": "seed_oss"})
    with pytest.raises(ValueError, match="no weight table"):
        weight_table(SHAPE)
    assert load_args(FLAGS, training=False)[0].architecture is None


def test_no_other_file_names_a_family() -> None:
    """Code elsewhere reads a field of the record; it compares no names."""
    places: dict[str, set[str]] = {name: set() for name in FAMILIES}
    for path in [*(ROOT / "slime").rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in places:
                places[node.value].add(str(path.relative_to(ROOT)))
    in_bench = {"bench/checkpoint.py", "bench/estimators.py", "bench/packing.py"}  # the models of measurements
    in_demo = {"slime/cli/demo.py", "slime/cli/arithmetic/make_task.py"}  # the two models that it offers
    registry = "slime/models/families.py"
    assert {name: found - in_bench - in_demo for name, found in places.items()} == {
        name: {registry, f"slime/models/{name}.py"} for name in FAMILIES
    }
