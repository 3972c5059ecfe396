"""Sampling: logits to one token a row, and its log-prob.

Path: `scheduler` calls `sample` after each forward. Invariants: log-probs are those of softmax(logits / temperature)
before top-p, top-k and min-p take tokens away (raw at temperature 0), which is SGLang's rule; and a row's draw is a
pure function of its seed and its position, whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SORTED_CANDIDATES = 1024
"""Tokens sorted for top-p and top-k first; the whole vocabulary only where these do not suffice."""


@dataclass(frozen=True)
class SamplingBatch:
    """One entry a row. temperature 0: greedy. top_k -1, top_p 1 and min_p 0 are off."""

    temperature: NDArray[np.float64]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    position: NDArray[np.int64]
    """Of the token to be drawn, in prompt and response together."""


@dataclass(frozen=True)
class Draw:
    tokens: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    finite: NDArray[np.bool_]
    """False where the logits held NaN or infinity: that row's token means nothing."""


def sample(logits_BV: Tensor, batch: SamplingBatch) -> Draw:
    """Draw one token a row by inverting the cumulative distribution.

    (`torch.multinomial` runs on one core and costs more than a small model's whole step.)
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
    # Strictly below the total, and right=True: a token of mass 0 is never drawn, whatever the rounding.
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
    """`mass` with the tokens outside top-k, top-p and min-p set to 0, all three judged on the full distribution."""
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
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: NDArray[np.uint64], position: NDArray[np.int64]) -> NDArray[np.float64]:
    """A counter-based uniform in [0, 1) for each (seed, position)."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seed + _GAMMA) + position.astype(np.uint64) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
