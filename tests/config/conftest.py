"""The fixtures for a valid command line on a small model, in which tests make one thing wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_run import GLM4_TINY, MESSAGE, Run, write_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.hf.mkdir()
    (run.hf / "config.json").write_text(json.dumps(GLM4_TINY))
    write_tokenizer(run.hf, largest_id=20)
    run.data.write_text(json.dumps(MESSAGE) + "\n")
    run.base = [
        *("--hf-checkpoint", str(run.hf), "--ref-load", str(run.hf), "--prompt-data", str(run.data)),
        *("--rollout-engine", "embedded", "--rollout-num-gpus", "2", "--label-key", "label", "--apply-chat-template"),
        *("--rm-type", "deepscaler", "--num-rollout", "3", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"),
        *("--rollout-max-response-len", "40", "--no-bf16"),
    ]
    return run
