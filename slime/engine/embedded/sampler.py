"""Sampling: draw one token for each row of logits, with its log-prob.

- Called by: `scheduler` calls `sample` after each forward pass.
- Invariant: log-probs are those of softmax(logits / temperature) before top-p, top-k and min-p remove tokens (of the
  raw logits at temperature 0), which is SGLang's rule. A row's draw is a pure function of its seed and its position,
  whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SORTED_CANDIDATES = 1024
"""The number of tokens sorted first for top-p and top-k; the whole vocabulary is sorted only if they do not suffice."""


@dataclass(frozen=True)
class SamplingBatch:
    """The sampling settings, one entry for each row. temperature 0 is greedy; top_k -1, top_p 1 and min_p 0 are off."""

    temperature: NDArray[np.float64]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """The position of the token to draw, counted over prompt and response."""


@dataclass(frozen=True)
class Draw:
    tokens: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    finite: NDArray[np.bool_]
    """False if the logits held NaN or infinity; the token of that row has no meaning."""


def sample(logits_BV: Tensor, batch: SamplingBatch) -> Draw:
    """Draw one token for each row by inverting the cumulative distribution.

    `torch.multinomial` is not used: it runs on one core and costs more than a whole step of a small model.
    """
    greedy = batch.temperature == 0
    scaled = logits_BV
    if (batch.temperature != 1).any():
        scaled = scaled / torch.from_numpy(np.where(greedy, 1.0, batch.temperature)).float()[:, None]
    peak, best = scaled.max(dim=-1, keepdim=True)
    mass = torch.exp(scaled - peak)
    cumulative = mass.cumsum(dim=-1)
    log_total = cumulative[:, -1:].log()
    restricted = np.flatnonzero(((batch.top_p < 1) | (batch.top_k > 0) | (batch.min_p > 0)) & ~greedy)
    if len(restricted):
        rows = torch.from_numpy(restricted)
        kept = _restrict(mass[rows], batch, restricted)
        cumulative[rows] = kept.cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = total * torch.from_numpy(uniform(batch.seed, batch.position)).float()[:, None]
    # Stay strictly below the total, with right=True: a token of mass 0 is never drawn, however the sum is rounded.
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    if greedy.any():
        drawn = torch.where(torch.from_numpy(greedy)[:, None], best, drawn)
    log_probs = scaled.gather(-1, drawn) - peak - log_total
    return Draw(
        tokens=drawn[:, 0].numpy(),
        log_probs=log_probs[:, 0].numpy(),
        finite=torch.isfinite(log_total[:, 0]).numpy(),
    )


def _restrict(mass: Tensor, batch: SamplingBatch, rows: NDArray[np.int64]) -> Tensor:
    """Return `mass` with tokens outside top-k, top-p and min-p set to 0; all three use the full distribution."""
    vocabulary = mass.shape[-1]
    top_p = torch.from_numpy(batch.top_p[rows]).float()[:, None]
    top_k = torch.from_numpy(np.where(batch.top_k[rows] > 0, batch.top_k[rows], vocabulary))[:, None]
    min_p = torch.from_numpy(batch.min_p[rows]).float()[:, None]
    limit = top_p * mass.sum(dim=-1, keepdim=True)
    count = min(SORTED_CANDIDATES, vocabulary)
    values, tokens = mass.topk(count, dim=-1)
    enough = (values.sum(dim=-1, keepdim=True) >= limit) | (top_k <= count)
    if not bool(enough.all()):
        values, tokens = mass.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values
    keep = (before <= limit) & (torch.arange(values.shape[-1]) < top_k) & (values >= min_p * values[:, :1])
    return torch.zeros_like(mass).scatter_(-1, tokens, values * keep)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a counter-based uniform number in [0, 1) for each (seed, position)."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seed + _GAMMA) + position.astype(np.uint64) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
