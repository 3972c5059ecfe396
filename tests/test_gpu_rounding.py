"""The limit of the GPU checks for |train - rollout log-prob|, on a tiny model and a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slime.core.sample import Sample
from tests.engine.tiny_models import make_model
from tests.gpu.engine import log_probs
from tests.gpu.rounding import SAMPLES, measure_rounding

TEMPERATURE = 0.8


def test_the_limit_equals_the_rounding_of_bf16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model_dir = make_model(tmp_path / "model", "glm4", seed=1, dtype=torch.bfloat16)
    exact: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    exact.float()
    torch.manual_seed(0)
    samples: list[Sample] = []
    for index in range(2 * SAMPLES):
        prompt, response = torch.randint(3, 128, (2, 10)).tolist()
        found = log_probs(exact, prompt, response, TEMPERATURE)
        samples.append(
            Sample(
                index=index,
                tokens=[*prompt, *response],
                prompt_length=len(prompt),
                response_length=len(response),
                rollout_log_probs=[each + 0.25 for each in found],
            )
        )
    rounding = measure_rounding(model_dir, samples, TEMPERATURE, device="cpu")
    assert rounding.engine == pytest.approx(0.25, abs=1e-5), "an engine that is off is seen"
    assert 1e-4 < rounding.bf16 < 0.02
    assert rounding.wrong > 5 * rounding.limit == 10 * rounding.bf16
