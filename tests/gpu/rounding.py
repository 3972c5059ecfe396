"""Measure how far bf16 alone moves log-probs: the limit for the gap between trainer and engine on the same tokens.

The limit depends on the weights. With GLM4-9B's architecture and random weights it is a few hundredths, with a trained
small model a few thousandths. A fixed number would be wrong for one of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime.core.sample import Sample
from tests.gpu.engine import log_probs

SAMPLES = 16
TIMES = 2.0
"""The limit, as a multiple of the rounding. Trainer and engine both round, and two such errors differ by 1.4 times."""


@dataclass(frozen=True)
class Rounding:
    """Mean errors over the sampled tokens, at the temperature at which they were sampled."""

    bf16: float
    """|log-prob of Hugging Face's model in bf16 - in fp32|, with the same weights."""
    engine: float
    """|log-prob that the engine gave - Hugging Face's in fp32|."""
    wrong: float
    """A control: like `bf16`, but with another temperature in bf16."""

    @property
    def limit(self) -> float:
        return TIMES * self.bf16


def measure_rounding(model_dir: Path, samples: Sequence[Sample], temperature: float, *, device: str) -> Rounding:
    """Measure with at most `SAMPLES` of the samples, which the bf16 weights in `model_dir` have generated.

    The device has to hold the model in fp32 (4 bytes per parameter) and the logits of one sample.
    """
    from transformers import AutoModelForCausalLM

    chosen = [sample for sample in samples[:: -(-len(samples) // SAMPLES)] if sample.response_length]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = loaded.eval().to(device)
    rounded, wrong = _scored(model, chosen, temperature), _scored(model, chosen, 1.25 * temperature)
    model.float()  # converts one parameter after another, so there are never two copies of the model
    exact = _scored(model, chosen, temperature)
    from_engine = [log_prob for sample in chosen for log_prob in sample.rollout_log_probs or ()]
    return Rounding(*(_mean_gap(each, exact) for each in (rounded, from_engine, wrong)))


def _scored(model: Any, samples: Sequence[Sample], temperature: float) -> list[float]:
    """Return the log-prob of each response token, one sample after another."""
    return [
        log_prob
        for sample in samples
        for log_prob in log_probs(
            model, sample.tokens[: sample.prompt_length], sample.tokens[sample.prompt_length :], temperature
        )
    ]


def _mean_gap(found: Sequence[float], exact: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(found, exact, strict=True))
