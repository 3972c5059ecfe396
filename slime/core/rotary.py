"""RoPE's frequencies, with Llama 3's scaling.

Path: the trainer's attention and the embedded engine both take them from here. Invariant: they are transformers' own,
bit for bit, or policy and engine would part more and more along a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slime.core.architecture import Architecture, RopeScaling


def inverse_frequencies(shape: Architecture) -> Tensor:
    """Radians a position, [rotary_dim / 2], float32 on the CPU."""
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.float32) / shape.rotary_dim
    frequencies = 1.0 / shape.rotary_base**exponents
    return frequencies if shape.rope_scaling is None else _scaled(frequencies, shape.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: fast channels turn as they did, slow ones `factor` times slower, those between are blended.

    Fast and slow are told by the turns that a channel makes over the length of the original training.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    share = (length / wavelengths - low) / (high - low)
    blended = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < length / high, frequencies, scaled)
