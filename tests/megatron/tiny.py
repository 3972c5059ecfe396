"""Tiny models of every family as HF directories, batches for them, and arguments to train them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime.config.architecture import hf_architecture, read_hf_config
from slime.config.args import Args
from slime.core.batch import TrainBatch

FAMILIES = ("glm4", "qwen3", "qwen2", "llama3")
"""glm4 and qwen3 have an output layer of their own; qwen2 and llama3 are tied, like their small models."""
MIXTURES = ("glm4_moe", "qwen3_moe")
"""Three layers; glm4_moe's first is dense."""
VOCAB = 93
"""Not a multiple of anything, so that the table has padding, and at TP 2 a rank with padding only."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,  # transformers gives a padding token no gradient
    "eos_token_id": 1,
}

ROPE_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""So short a training length that a head's channels are of all three kinds: unchanged, blended, slowed down."""


def hf_model(family: str, *, seed: int = 0, num_layers: int = SHAPE["num_hidden_layers"]) -> torch.nn.Module:
    """Return a random model of FAMILIES, MIXTURES or "qwen3-tied", with weights so large that a mistake shows."""
    import transformers as hf

    shape = {**SHAPE, "num_hidden_layers": num_layers}
    if family == "glm4":
        config = hf.Glm4Config(**shape, head_dim=16, attention_bias=True, tie_word_embeddings=False)
    elif family in MIXTURES:
        config = mixture_config(family)
    elif family == "qwen2":
        config = hf.Qwen2Config(**shape, tie_word_embeddings=True)
    elif family == "llama3":
        config = hf.LlamaConfig(**shape, rope_parameters=ROPE_SCALING, tie_word_embeddings=True)
    else:
        config = hf.Qwen3Config(**shape, head_dim=32, tie_word_embeddings=family == "qwen3-tied")
    model: Any = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.1 * noise)
            if name.endswith("gate.weight"):
                parameter.mul_(3)  # far from ties
    return model.eval()


def mixture_config(family: str, **changes: Any) -> Any:
    """Return a config of MIXTURES: eight experts, of which each token goes to two."""
    import transformers as hf

    shape = {**SHAPE, "num_hidden_layers": 3, "head_dim": 16, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        return hf.Qwen3MoeConfig(**{**shape, "num_experts": 8, "norm_topk_prob": True, **changes})
    own = {"n_routed_experts": 8, "n_shared_experts": 2, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
    own |= {"attention_bias": True, "use_qk_norm": True}
    return hf.Glm4MoeConfig(**{**shape, **own, **changes})


def hf_dir(path: Path, family: str, *, seed: int = 0, num_layers: int = SHAPE["num_hidden_layers"]) -> Path:
    hf_model(family, seed=seed, num_layers=num_layers).save_pretrained(path)
    return path


def make_args(hf: Path, **changes: Any) -> Args:
    """Return arguments to train the model in `hf`: fp32, one thread, AdamW with a rate that has a visible effect."""
    defaults: dict[str, Any] = {
        "architecture": hf_architecture(read_hf_config(hf)),
        "hf_checkpoint": str(hf),
        "ref_load": str(hf),
        "num_rollout": 10,
        "cpu_threads_per_process": 1,
        "train_timeout": 60.0,
        "bf16": False,
        "lr": 1e-3,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 128,
        "rollout_temperature": 0.8,
        "num_steps_per_rollout": 1,
        "log_probs_chunk_size": 16,
    }
    return Args(**{**defaults, **changes})


def random_batch(
    num_samples: int = 8,
    *,
    group: int = 4,
    seed: int = 0,
    with_rollout: bool = True,
    lengths: Sequence[int] | None = None,
) -> TrainBatch:
    """Make samples of different response lengths (or `lengths`), some tokens masked, rewards that vary in groups."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(2, 12, num_samples)
    drawn = generator.integers(3, 30, num_samples)
    responses = drawn if lengths is None else np.array(lengths)
    total, num_responses = int((prompts + responses).sum()), int(responses.sum())
    mask = (generator.random(num_responses) > 0.1).astype(np.float32)
    columns = {
        "tokens": generator.integers(0, VOCAB, total),
        "loss_mask": mask,
        "rewards": generator.integers(0, 2, num_samples).astype(np.float32) + generator.random(num_samples) * 0.1,
        "group_indices": np.arange(num_samples) // group,
        "sample_indices": np.arange(num_samples),
    }
    if with_rollout:
        columns["rollout_log_probs"] = -generator.random(num_responses).astype(np.float32) * 4
    columns["rewards"] = columns["rewards"].astype(np.float32)
    return TrainBatch(prompts + responses, responses, columns)
