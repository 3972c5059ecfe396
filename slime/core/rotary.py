"""RoPE frequencies, with Llama 3's scaling.

- Used by: the trainer's attention and the embedded engine, so that both rotate by the same angles.
- Invariant: the frequencies equal those of transformers bit for bit. Otherwise the policy and the engine would differ
  more and more along a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slime.core.architecture import Architecture, RopeScaling


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Return radians per position, [rotary_dim / 2], float32 on the CPU."""
    exponents = torch.arange(0, arch.rotary_dim, 2, dtype=torch.float32) / arch.rotary_dim
    frequencies = 1.0 / arch.rotary_base**exponents
    return frequencies if arch.rope_scaling is None else _scaled(frequencies, arch.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Apply Llama 3.1's rule: keep fast channels, slow down slow ones by `factor`, and blend those between.

    A channel is fast or slow by the number of turns that it makes over the length of the original training: more than
    `high_freq_factor` is fast, fewer than `low_freq_factor` is slow.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < length / high, frequencies, scaled)
