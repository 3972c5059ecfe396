"""A layer's fused steps: which norms are computed with the sum before them, and which layers keep separate ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.compat import cpu_layer
from slime.megatron.model.attention import PackedAttention, pack_sequences
from slime.megatron.model.build import build_model, transformer_config
from slime.megatron.model.layer import PackedSelfAttention, RMSNorm

LENGTHS = [30, 10]


@dataclass
class Seen:
    """The norms of one forward pass, by name: True if the result was computed before, with the sum."""

    norms: dict[str, bool] = field(default_factory=dict)
    recorded: bool = False
    """Whether the residual stream that the last norm reads has a gradient."""
    own_rotation: set[str] = field(default_factory=set)
    """The classes of self-attention whose core attention applies the positions."""


def _forward(rank: int, world_size: int, init_method: str, args: Args) -> list[Seen]:
    """Run a model forward, with gradients and without."""
    with joined(args, rank, world_size, init_method):
        model = build_model(args, wrap=False)[0]
        found: list[Seen] = []
        hooked = Seen()
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm):

                def hook(norm: Any, inputs: Any, name: str = name) -> None:
                    expected = norm._expected
                    found[-1].norms[name] = expected is not None and expected[0] is inputs[0]
                    if name.endswith("final_layernorm"):
                        found[-1].recorded = inputs[0].requires_grad

                module.register_forward_pre_hook(hook)
            core = getattr(module, "core_attention", None)
            if isinstance(core, PackedAttention) and core.rotates:
                hooked.own_rotation.add(type(module).__name__)
        assert args.architecture is not None
        pack = pack_sequences(LENGTHS, args.architecture)
        tokens = torch.arange(sum(LENGTHS))[None]
        for gradients in (True, False):
            model.train(gradients)
            found.append(Seen(own_rotation=hooked.own_rotation))
            with torch.set_grad_enabled(gradients), cpu_layer.layer():
                model(tokens, None, None, packed_seq_params=pack)
        return found


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.hf_dir(root / family, family) for family in ("glm4", "qwen3")}


@pytest.mark.dist
@pytest.mark.parametrize("family", ["glm4", "qwen3"])
def test_sums_are_computed_with_the_norm(family: str, workers: WorkerPool, hf: dict[str, Path]) -> None:
    """Only the first norm has no sum before it, and norms of heads or of a sub-layer's output are never called."""
    args = tiny.make_args(hf[family])
    train, evaluate = workers.run(1, _forward, args)[0]
    assert [name for name, before in train.norms.items() if not before] == ["decoder.layers.0.input_layernorm"]
    assert len(train.norms) == 2 * 2 + 1
    assert evaluate.norms == train.norms
    assert train.own_rotation == set()


@pytest.mark.dist
def test_no_gradient_is_recorded_for_log_probs(workers: WorkerPool, hf: dict[str, Path]) -> None:
    """Megatron adds to the residual stream with gradients on, and a norm in there would keep its input."""
    train, evaluate = workers.run(1, _forward, tiny.make_args(hf["glm4"]))[0]
    assert (train.recorded, evaluate.recorded) == (True, False)


@pytest.mark.dist
def test_recomputed_layers_are_not_linked(workers: WorkerPool, hf: dict[str, Path]) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    seen = workers.run(1, _forward, tiny.make_args(hf["glm4"], **full))[0][1]
    with_sums = {name for name, before in seen.norms.items() if before}
    assert with_sums == {f"decoder.layers.{layer}.pre_mlp_layernorm" for layer in range(2)}


@pytest.mark.dist
def test_megatrons_layer_keeps_separate_operations(workers: WorkerPool, hf: dict[str, Path]) -> None:
    args = tiny.make_args(hf["qwen3"], spec=("specs_for_tests", "megatrons"))
    seen = workers.run(1, _forward, args)[0][0]
    assert not any(seen.norms.values())
    assert seen.own_rotation == {"SelfAttention"}


@pytest.mark.dist
@pytest.mark.parametrize("spec", ["other_head_norms", "own_core_attention"])
def test_other_parts_keep_megatrons_split(spec: str, workers: WorkerPool, hf: dict[str, Path]) -> None:
    args = tiny.make_args(hf["qwen3"], spec=("specs_for_tests", spec))
    seen = workers.run(1, _forward, args)[0][0]
    assert seen.own_rotation == {PackedSelfAttention.__name__}
    assert sum(name.endswith(("q_layernorm", "k_layernorm")) for name in seen.norms) == 2 * 2


def test_a_result_is_for_one_tensor(hf: dict[str, Path]) -> None:
    args = tiny.make_args(hf["qwen3"])
    with cpu_layer.layer():
        norm = RMSNorm(transformer_config(args), 8)
    x, made = torch.randn(3, 8), torch.zeros(3, 8)
    plain = norm(x)
    norm.expect(x, made)
    assert norm(x) is made
    assert torch.equal(norm(x), plain)  # a result is used once
    norm.expect(x, made)
    assert torch.equal(norm(x.clone()), plain)
    assert torch.equal(norm(x), plain)
