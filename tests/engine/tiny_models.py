"""Tiny HF models with a tokenizer, for engines to serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.forked_engine import ForkedEngine

SPECIALS = ["<|endoftext|>", "<|user|>"]
VOCABULARY = SPECIALS + ["\n"] + [chr(c) for c in range(32, 127)]
EOS = 0
VOCAB_SIZE = 128
StartEngine = Callable[..., ForkedEngine]
"""start_engine(model_dir, *flags) -> a ready engine."""


def _config(family: str, *, vocab_size: int, hidden: int, eos: list[int]) -> Any:
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "eos_token_id": eos,
        "pad_token_id": EOS,
        "bos_token_id": None,
    }
    if family.endswith("_moe"):
        common |= {"moe_intermediate_size": hidden // 2, "num_experts_per_tok": 3, "norm_topk_prob": True}
    rope: dict[str, Any] = {"rope_theta": 1e6, "rope_type": "default"}
    if family.startswith("glm4"):
        rope |= {"partial_rotary_factor": 0.5, "rope_theta": 1e4}
        common |= {"attention_bias": True}
    if family == "llama3":
        rope |= {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    if family == "glm4_moe":
        common |= {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}
        common |= {"first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "use_qk_norm": True}
    if family == "qwen3_moe":
        common |= {"num_experts": 8}
    if family == "mistral":
        common |= {"sliding_window": None}
    if family in ("llama3", "qwen2", "qwen3"):
        common |= {"tie_word_embeddings": family != "qwen2"}
    epsilon = 1e-6 if family.startswith("qwen") else 1e-5
    model_type = "llama" if family == "llama3" else family
    return AutoConfig.for_model(model_type, **common, rms_norm_eps=epsilon, rope_parameters=rope)


def make_model(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    hidden: int = 64,
    dtype: torch.dtype = torch.float32,
    eos: list[int] | None = None,
) -> Path:
    """Save a random model whose distribution over tokens is uneven, biases and norms random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        _config(family, vocab_size=vocab_size, hidden=hidden, eos=eos or []), dtype=torch.float32
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            else:
                torch.nn.init.normal_(p, std=0.3 if "embed" in name else p.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.to(dtype).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def hf_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def hf_log_probs(model: Any, ids: list[int], temperature: float) -> list[float]:
    """Return log-probs of all tokens but the first under softmax(logits / temperature); raw at temperature 0."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    return log_probs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
