"""The packed Megatron model against transformers: logits, loss and gradients, for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from runs import difference
from safetensors.torch import load_file, save_file
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.core.architecture import RopeScaling
from slime.megatron.compat import cpu_layer
from slime.megatron.model.attention import pack_sequences
from slime.megatron.model.build import build_model, named_parameters, unwrap
from slime.megatron.model.hf_weights import load_hf_into
from slime.models.families import weight_table
from slime.models.hf_files import HFReader

pytestmark = pytest.mark.dist

LENGTHS = [33, 20, 7]
TOLERANCE = 1e-5


def _tokens_and_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, tiny.VOCAB, (sum(LENGTHS),), generator=generator)
    return tokens, torch.randn(sum(LENGTHS), tiny.VOCAB, generator=generator) / sum(LENGTHS)


def _megatron(
    rank: int, world_size: int, init_method: str, args: Args, hf: Path, lengths: list[int]
) -> tuple[Any, float, Any]:
    """Return logits, loss (a weighted sum of log-probs) and gradients by HF name."""
    arch = args.architecture
    assert arch is not None
    with joined(args, rank, world_size, init_method), cpu_layer.layer():
        model = build_model(args, wrap=False)
        load_hf_into(model, arch, HFReader(hf), args)
        tokens, weights = _tokens_and_weights()
        hidden = model[0](tokens[None], None, None, packed_seq_params=pack_sequences(lengths, arch))
        logits = F.linear(hidden[:, 0], unwrap(model[0]).output_weight())[:, : tiny.VOCAB]
        loss = (logits.log_softmax(-1) * weights).sum()
        loss.backward()
        table = weight_table(arch)
        gradients = {
            hf_name: gradient.numpy()
            for name, parameter in named_parameters(model)
            for hf_name, gradient in table.to_hf(name, parameter.grad)
        }
        return logits.detach().numpy(), loss.item(), gradients


def _huggingface(family: str) -> tuple[Any, float, Any]:
    model = tiny.hf_model(family)
    tokens, weights = _tokens_and_weights()
    logits = torch.cat([model(row[None]).logits[0] for row in tokens.split(LENGTHS)])
    loss = (logits.log_softmax(-1) * weights).sum()
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return logits.detach().numpy(), loss.item(), gradients


def _worst(found: tuple[Any, float, Any], expected: tuple[Any, float, Any]) -> dict[str, float]:
    """Return relative differences; a tied model's output layer is not a separate parameter in either."""
    return {
        "logits": difference({"": found[0]}, {"": expected[0]}),
        "loss": abs(found[1] - expected[1]) / abs(expected[1]),
        "gradients": difference(found[2], expected[2]),
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_loss_and_gradients_match_transformers(family: str, workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, family))
    [found] = workers.run(1, _megatron, args, tmp_path, LENGTHS)
    worst = _worst(found, _huggingface(family))
    assert max(worst.values()) <= TOLERANCE, worst


WRONG = {
    "rotation of halves for pairs": ("glm4", {"rotary_interleaved": False}),
    "rotation of pairs for halves": ("qwen3", {"rotary_interleaved": True}),
    "all channels rotated": ("glm4", {"rotary_percent": 1.0}),
    "another base": ("qwen3", {"rotary_base": 1e6}),
    "another epsilon": ("qwen3", {"norm_epsilon": 1e-2}),
    "no scaling of RoPE": ("llama3", {"rope_scaling": None}),
    "RoPE scaled for another length": ("llama3", {"rope_scaling": RopeScaling(original_max_position_embeddings=64)}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_control_a_wrong_architecture_is_noticed(wrong: str, workers: WorkerPool, tmp_path: Path) -> None:
    family, change = WRONG[wrong]
    args = tiny.make_args(tiny.hf_dir(tmp_path, family))
    assert args.architecture is not None
    args = replace(args, architecture=replace(args.architecture, **change))
    [found] = workers.run(1, _megatron, args, tmp_path, LENGTHS)
    assert min(_worst(found, _huggingface(family)).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("bias", "qkv")
def test_control_a_missing_bias_is_noticed(bias: str, workers: WorkerPool, tmp_path: Path) -> None:
    """Leave out a bias of the last layer. A key's bias shifts all scores of a query equally, but for RoPE."""
    args = tiny.make_args(tiny.hf_dir(tmp_path, "qwen2"))
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"model.layers.1.self_attn.{bias}_proj.bias"].zero_()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    [found] = workers.run(1, _megatron, args, tmp_path, LENGTHS)
    assert min(_worst(found, _huggingface("qwen2")).values()) > 10 * TOLERANCE


def test_control_a_wrong_boundary_is_noticed(workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, "glm4"))
    [found] = workers.run(1, _megatron, args, tmp_path, [34, 19, 7])
    assert min(_worst(found, _huggingface("glm4")).values()) > 10 * TOLERANCE


def test_control_missing_norms_are_noticed(workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, "glm4"))
    assert args.architecture is not None
    arch = replace(args.architecture, post_self_attn_layernorm=False, post_mlp_layernorm=False)
    with pytest.raises(AssertionError, match="post_self_attn_layernorm"):
        workers.run(1, _megatron, replace(args, architecture=arch), tmp_path, LENGTHS)
