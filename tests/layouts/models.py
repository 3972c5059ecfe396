"""Small random models as Hugging Face directories, an actor and a reference of each, made when they are needed.

Each family also has variants of the sizes that some layouts need: four KV heads for tensor parallelism 4, and four
layers for virtual stages.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.config.config_run import write_tokenizer

DENSE = ("glm4", "qwen3", "qwen2", "llama3")
"""glm4 and qwen3 have an output layer of their own; qwen2 and llama3 are tied."""
MOE = ("qwen3_moe", "glm4_moe")
NUM_EXPERTS, TOPK = 4, 2
VOCAB = 61
"""The vocabulary size, a multiple of nothing, so that tables have padding."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": None,  # transformers gives a padding token no gradient
    "eos_token_id": 1,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": TOPK, "moe_intermediate_size": 24, "norm_topk_prob": True}


@dataclass(frozen=True)
class Model:
    family: str
    num_layers: int
    num_query_groups: int

    @property
    def has_experts(self) -> bool:
        return self.family in MOE

    def config(self) -> Any:
        import transformers as hf

        shape = {**SHAPE, "num_hidden_layers": self.num_layers, "num_key_value_heads": self.num_query_groups}
        match self.family:
            case "glm4":
                return hf.Glm4Config(**shape, head_dim=8, attention_bias=True, tie_word_embeddings=False)
            case "qwen2":
                return hf.Qwen2Config(**shape, tie_word_embeddings=True)
            case "llama3":
                return hf.LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
            case "qwen3":
                return hf.Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False)
            case "qwen3_moe":
                experts = {**EXPERTS, "num_experts": NUM_EXPERTS}
                return hf.Qwen3MoeConfig(**shape, **experts, head_dim=16, tie_word_embeddings=False)
            case "glm4_moe":
                experts = {**EXPERTS, "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "n_group": 1}
                experts |= {"topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
                return hf.Glm4MoeConfig(**shape, **experts, head_dim=8, attention_bias=True, use_qk_norm=True)
            case _:
                raise AssertionError(self.family)

    def directories(self, root: Path) -> tuple[Path, Path]:
        """Return the directories of actor and reference."""
        folder = root / f"{self.family}-{self.num_layers}-{self.num_query_groups}"
        found = folder / "actor", folder / "reference"
        for seed, path in enumerate(found):
            if not path.exists():
                self._write(path, seed)
        return found

    def _write(self, path: Path, seed: int) -> None:
        import transformers as hf

        model: Any = hf.AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, values in [*model.named_parameters(), *model.named_buffers()]:
                noise = torch.randn(values.shape, generator=generator)
                if name.endswith("norm.weight"):
                    values.copy_(1 + 0.2 * noise)
                elif isinstance(values, torch.nn.Parameter) or name.endswith("e_score_correction_bias"):
                    values.copy_(0.15 * noise)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            model.save_pretrained(path)
        write_tokenizer(path, largest_id=VOCAB - 1)
