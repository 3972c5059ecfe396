"""Weight tables against the models of transformers, in both directions, at every tensor-parallel size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from slime.config.architecture import hf_architecture
from slime.core.architecture import Architecture, padded_vocab_size
from slime.models.families import FAMILIES, weight_table
from slime.models.mapping import QKV, GateUp, Rename, Rule, WeightTable, pad_vocab

TP_SIZES = (1, 2, 4)


def hf_model(family: str, *, tied: bool = False, bias: bool = True, **sizes: int) -> Any:
    """Return a model of transformers without storage; its names and shapes are the real ones."""
    shape = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    } | sizes
    common: dict[str, Any] = {**shape, "tie_word_embeddings": tied, "pad_token_id": 0}
    if family.endswith("_moe"):
        common |= {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
    if family == "glm4":
        common |= {"attention_bias": bias}
    elif family == "glm4_moe":
        common |= {"n_routed_experts": 4, "first_k_dense_replace": 0, "use_qk_norm": not bias, "attention_bias": bias}
    elif family == "qwen3_moe":
        common |= {"num_experts": 4, "norm_topk_prob": True}
    elif family == "mistral":
        common |= {"sliding_window": None}
    config = AutoConfig.for_model(family, **common)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def random_weights(model: Any, tied: bool) -> dict[str, Tensor]:
    """Return random bits for every tensor in this model's files, as bf16, so that copies can be compared bitwise."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in in_files(shapes).items()}


def in_files(shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    """Split the fused expert tensors of transformers into the tensors of the files, one for each expert."""
    found: dict[str, torch.Size] = {}
    for name, shape in shapes.items():
        head, _, kind = name.rpartition(".experts.")
        if not head:
            found[name] = shape
            continue
        for expert in range(shape[0]):
            halves = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            sizes = torch.Size([shape[1] // len(halves), shape[2]])
            found |= {f"{head}.experts.{expert}.{half}.weight": sizes for half in halves}
    return found


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))


def assert_round_trips(table: WeightTable, weights: dict[str, Tensor], architecture: Architecture) -> None:
    """Go from HF to Megatron, to shards, to Megatron and back to HF, and check that every name appears exactly once."""
    table.check(table.megatron_names(), weights)
    for tp_size in TP_SIZES:
        padded = padded_vocab_size(architecture.vocab_size, 8, tp_size)
        seen: list[str] = []
        for name in table.megatron_names():
            full = table.pad(name, table.from_hf(name, weights.__getitem__), padded)
            shards = [table.split(name, full, tp_size, rank) for rank in range(tp_size)]
            joined = table.join(name, shards)
            assert_same(joined, full)
            for hf_name, tensor in table.to_hf(name, joined):
                assert_same(tensor, weights[hf_name])
                seen.append(hf_name)
        assert seen == table.hf_names()
        assert sorted(seen) == sorted(weights)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    bias=st.booleans(),
    vocab_size=st.integers(1, 70),
    hidden_per_head=st.sampled_from([1, 3]),
    intermediate_size=st.sampled_from([4, 12, 28]),
    num_hidden_layers=st.integers(1, 3),
    num_key_value_heads=st.sampled_from([1, 2, 4, 8]),
    heads_per_group=st.sampled_from([4, 8, 12]),
    head_dim=st.sampled_from([2, 6, 8]),
)
def test_round_trip(family: str, tied: bool, bias: bool, heads_per_group: int, hidden_per_head: int, **sizes: int):
    sizes["num_attention_heads"] = sizes["num_key_value_heads"] * heads_per_group
    sizes["hidden_size"] = sizes["num_attention_heads"] * hidden_per_head
    model = hf_model(family, tied=tied, bias=bias, **sizes)
    architecture = hf_architecture(model.config.to_dict())
    assert_round_trips(weight_table(architecture), random_weights(model, tied), architecture)


class Swapped(GateUp):
    """A wrong rule: it exports up before gate."""

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        return tuple(reversed(super().export(full)))


class Plain(QKV):
    """A wrong rule: it exports queries, keys and values one after the other."""

    def export(self, full: Tensor) -> tuple[Tensor, ...]:
        keys = self.num_query_groups * self.head_dim
        return full.split([full.shape[0] - 2 * keys, keys, keys])


@pytest.mark.parametrize(("right", "wrong"), [(GateUp, Swapped), (QKV, Plain)])
def test_round_trip_notices_a_wrong_rule(right: type[Rule], wrong: type[Rule]):
    model = hf_model("qwen3")
    architecture = hf_architecture(model.config.to_dict())
    table, weights = weight_table(architecture), random_weights(model, tied=False)
    assert_round_trips(table, weights, architecture)
    for name, rule in table.rules.items():
        if type(rule) is right:
            table.rules[name] = wrong(**vars(rule))
    with pytest.raises(AssertionError):
        assert_round_trips(table, weights, architecture)


def mlp(fc1: Tensor, fc2: Tensor, x: Tensor) -> Tensor:
    gate, up = (fc1 @ x).chunk(2)
    return fc2 @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_gate_up_shards_compute_the_whole_mlp(tp_size: int):
    """A round trip cannot see the layout of a shard; the results that ranks compute with their shards can."""
    fc1, fc2, x = torch.randn(24, 6).double(), torch.randn(6, 12).double(), torch.randn(6).double()
    column, row = GateUp("fc1", ("gate_up",)), Rename("fc2", ("down",), axis=1)

    def summed(rule: Rule) -> Tensor:
        shards = [(rule.split(fc1, tp_size, r), row.split(fc2, tp_size, r)) for r in range(tp_size)]
        return torch.stack([mlp(*shard, x) for shard in shards]).sum(0)

    torch.testing.assert_close(summed(column), mlp(fc1, fc2, x))
    assert not torch.allclose(summed(Rename("fc1", ("gate_up",), axis=0)), mlp(fc1, fc2, x))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_shards_hold_whole_groups(tp_size: int, kind: str):
    groups, per_group, head = 4, 3, 2
    rest = (5,) if kind == "weight" else ()
    query = torch.randn(groups * per_group * head, *rest)
    key, value = torch.randn(groups * head, *rest), torch.randn(groups * head, *rest)
    rule = QKV("qkv", ("q", "k", "v"), groups, groups * per_group, head)
    full = rule.merge([query, key, value])
    for rank in range(tp_size):
        local = groups // tp_size
        # Attention.get_query_key_value_tensors: [groups of this rank, (heads of a group + 2) * head]
        shard = rule.split(full, tp_size, rank).view(local, (per_group + 2) * head, *rest)
        q, k, v = shard.split([per_group * head, head, head], dim=1)
        for ours, theirs in ((q, query), (k, key), (v, value)):
            assert torch.equal(ours.reshape(-1, *rest), theirs.chunk(tp_size)[rank])


def test_more_ranks_than_groups_share_a_group():
    rule = QKV("qkv", ("q", "k", "v"), 2, 8, 4)
    full = torch.randn(48, 3)
    assert torch.equal(torch.cat([rule.split(full, 4, rank) for rank in range(4)]), full)
    with pytest.raises(ValueError, match="--tensor-model-parallel-size 3: qkv has 2 query groups"):
        rule.split(full, 3, 0)


def test_every_parameter_is_counted():
    for family in FAMILIES:
        for tied in (False, True):
            model = hf_model(family, tied=tied)
            architecture = hf_architecture(model.config.to_dict())
            numel = sum(tensor.numel() for name, tensor in random_weights(model, tied).items() if "score" not in name)
            assert architecture.num_parameters() == numel


def test_check_lists_orphans_on_both_sides():
    model = hf_model("glm4")
    table = weight_table(hf_architecture(model.config.to_dict()))
    megatron, hf = table.megatron_names(), list(model.state_dict())
    table.check(megatron, hf)
    with pytest.raises(ValueError, match=r"without a rule: mtp\.weight; rules for .* lacks: output_layer\.weight"):
        table.check([*megatron[:-1], "mtp.weight"], hf)
    with pytest.raises(ValueError, match=r"without a rule: model\.extra; .* missing: lm_head\.weight"):
        table.check(megatron, [*(name for name in hf if name != "lm_head.weight"), "model.extra"])


def test_two_rules_for_one_name_are_refused():
    rules = [Rename("a", ("x",)), Rename("b", ("x",))]
    with pytest.raises(ValueError, match=r"two rules make \['x'\]"):
        WeightTable(rules, 0)
    with pytest.raises(ValueError, match="two rules for a"):
        WeightTable([Rename("a", ("x",)), Rename("a", ("y",))], 0)


def test_padding_is_zero_and_is_removed():
    model = hf_model("qwen3", tied=True)
    table = weight_table(hf_architecture(model.config.to_dict()))
    name = "embedding.word_embeddings.weight"
    full = torch.randn(37, 16)
    padded = table.pad(name, full, 48)
    assert padded.shape == (48, 16) and not padded[37:].any()
    ((hf_name, cut),) = table.to_hf(name, padded)
    assert hf_name == "model.embed_tokens.weight" and torch.equal(cut, full)
    assert table.pad("decoder.final_layernorm.weight", full, 48) is full
    with pytest.raises(ValueError, match="37 rows cannot be padded to 32"):
        pad_vocab(full, 32)


def test_tied_embeddings_have_no_output_layer():
    model = hf_model("qwen3", tied=True)
    table = weight_table(hf_architecture(model.config.to_dict()))
    assert "lm_head.weight" not in table.hf_names() and "output_layer.weight" not in table.megatron_names()
    table.check(table.megatron_names(), [*table.hf_names(), "lm_head.weight"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_bias_of_another_family_is_an_orphan(family: str):
    architecture = hf_architecture(hf_model(family).config.to_dict())
    assert not architecture.add_qkv_bias
    with pytest.raises(ValueError, match=r"without a rule: model\.layers\.0\.self_attn\.k_proj\.bias, "):
        weight_table(architecture).check(weight_table(architecture).megatron_names(), hf_model("qwen2").state_dict())


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("model.embed_tokens.weight", 36, "36 rows, the vocabulary has 37"),
        ("model.layers.1.self_attn.k_proj.weight", 24, "24 rows, the architecture has 2 heads of 6"),
    ],
)
def test_tensors_of_another_shape_are_named(name: str, rows: int, message: str):
    model = hf_model("qwen3")
    table, weights = weight_table(hf_architecture(model.config.to_dict())), random_weights(model, tied=False)
    weights[name] = torch.zeros(rows, 16)
    with pytest.raises(ValueError, match=message):
        read_all(table, weights)


def read_all(table: WeightTable, weights: dict[str, Tensor]) -> Sequence[Tensor]:
    return [table.from_hf(name, weights.__getitem__) for name in table.megatron_names()]


def test_an_unknown_family_is_named():
    model = hf_model("qwen3")
    architecture = hf_architecture(model.config.to_dict())
    with pytest.raises(ValueError, match=f"'mamba' has no weight table; there are: {', '.join(sorted(FAMILIES))}"):
        weight_table(Architecture(**{**vars(architecture), "family": "mamba"}))
