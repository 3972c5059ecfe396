"""Tiny models on disk, and engines that serve them, each made once for all tests in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import StartEngine

from tests.forked_engine import ForkedEngine


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make the families, qwen3 and llama3 tied; 'glm4-b' is glm4 with other weights, 'glm4-eos' ends by itself."""
    root = tmp_path_factory.mktemp("models")
    return {
        "glm4": tiny_models.make_model(root / "glm4", "glm4", seed=1),
        "glm4-b": tiny_models.make_model(root / "glm4-b", "glm4", seed=2),
        "glm4-eos": tiny_models.make_model(root / "glm4-eos", "glm4", seed=1, eos=[7, 9]),
        "glm4-bf16": tiny_models.make_model(root / "glm4-bf16", "glm4", seed=1, dtype=torch.bfloat16),
        "qwen3": tiny_models.make_model(root / "qwen3", "qwen3", seed=3),
        "qwen2": tiny_models.make_model(root / "qwen2", "qwen2", seed=4),
        "qwen3_moe": tiny_models.make_model(root / "qwen3_moe", "qwen3_moe", seed=6),
        "glm4_moe": tiny_models.make_model(root / "glm4_moe", "glm4_moe", seed=7),
        "mistral": tiny_models.make_model(root / "mistral", "mistral", seed=8),
        "llama3": tiny_models.make_model(root / "llama3", "llama3", seed=5),
    }


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartEngine]:
    """Return start_engine(model_dir, *flags, prepare=None) -> a ready engine; all are ended after the session."""
    logs = tmp_path_factory.mktemp("logs")
    started: list[ForkedEngine] = []

    def start(model: Path, *flags: str, prepare: Callable[[], None] | None = None) -> ForkedEngine:
        engine = ForkedEngine(model, *flags, log_path=logs / f"{len(started)}.log", prepare=prepare)
        started.append(engine)
        engine.wait_ready(60)
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.fixture(scope="session")
def glm4_engine(model_dirs: dict[str, Path], start_engine: StartEngine) -> ForkedEngine:
    return start_engine(model_dirs["glm4"])
