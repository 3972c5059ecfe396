"""A small model's config, data and checkpoints on disk, and the command line that uses them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime.config.args import Args
from slime.config.parse import UsageError
from slime.config.problem import Problem
from slime.plan.fit import load_run

ROOT = Path(__file__).parents[2]

GLM4_TINY: dict[str, Any] = {
    "model_type": "glm4",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
}

MESSAGE = {"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "label": "2"}


@dataclass
class Run:
    """A command line that passes every rule; each test makes one thing wrong."""

    directory: Path
    base: list[str] = field(default_factory=list[str])
    rollouts_ahead: int = 0
    """The number of rollouts generated ahead: 1 as in train_async.py."""

    @property
    def hf(self) -> Path:
        return self.directory / "hf"

    @property
    def data(self) -> Path:
        return self.directory / "train.jsonl"

    def load(self, *more: str) -> tuple[Args, list[Problem]]:
        return load_run([*self.base, *more], rollouts_ahead=self.rollouts_ahead)

    def args(self, *more: str) -> Args:
        return self.load(*more)[0]

    def errors(self, *more: str) -> list[str]:
        try:
            self.load(*more)
        except UsageError as error:
            return [str(problem) for problem in error.problems]
        return []

    def error(self, *more: str) -> str:
        """Return the single error; more than one, or none, fails the test."""
        [error] = self.errors(*more)
        return error

    def warnings(self, *more: str) -> list[str]:
        return [str(problem) for problem in self.load(*more)[1]]


def write_tokenizer(hf: Path, *, largest_id: int, template: bool = True, eos: str = "<|end|>") -> None:
    vocabulary = {f"t{i}": i for i in range(largest_id)}
    tokenizer: dict[str, Any] = {
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
        "added_tokens": [{"id": largest_id, "content": eos, "special": True}],
    }
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"eos_token": eos} | ({"chat_template": "{{ messages }}"} if template else {})
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
