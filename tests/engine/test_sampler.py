from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.engine.embedded.sampler import Draw, SamplingBatch, sample, uniform


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    min_p: float = 0.0,
    seed: NDArray[np.uint64] | None = None,
) -> Draw:
    """Draw one token for each row of `logits`, each row with a seed of its own."""
    n = len(logits)
    return sample(
        logits,
        SamplingBatch(
            temperature=np.full(n, temperature),
            top_p=np.full(n, top_p),
            top_k=np.full(n, top_k),
            min_p=np.full(n, min_p),
            seed=np.arange(n, dtype=np.uint64) if seed is None else seed,
            position=np.full(n, 5),
        ),
    )


def chi_square(tokens: NDArray[np.int64], probabilities: Tensor) -> float:
    """Return Pearson's statistic over its degrees of freedom, pooling tokens expected less than 5 times."""
    expected = probabilities.double().numpy() * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    counts = np.append(counts[~rare], counts[rare].sum())
    return float(((counts - expected) ** 2 / expected).sum() / (len(expected) - 1))


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    row = torch.randn(256) * 2
    logits = row.expand(40_000, -1)
    for temperature in (0.7, 1.0, 1.5):
        tokens = draw(logits, temperature=temperature).tokens
        assert chi_square(tokens, torch.softmax(row / temperature, 0)) < 1.35
        # Control: the distribution of another temperature is noticed.
        assert chi_square(tokens, torch.softmax(row / (temperature * 1.1), 0)) > 3


def test_log_probs_use_the_whole_tempered_distribution() -> None:
    torch.manual_seed(1)
    logits = torch.randn(64, 300) * 3
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}):
        got = draw(logits, temperature=0.8, **options)
        want = torch.log_softmax(logits.double() / 0.8, -1).gather(-1, torch.from_numpy(got.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(got.log_probs, want.numpy(), atol=2e-6)


def test_greedy_sampling_reports_raw_log_probs() -> None:
    torch.manual_seed(2)
    logits = torch.randn(32, 100)
    got = draw(logits, temperature=0.0, top_p=0.1)
    assert (got.tokens == logits.argmax(-1).numpy()).all()
    np.testing.assert_allclose(got.log_probs, torch.log_softmax(logits, -1).amax(-1).numpy(), atol=1e-6)


def kept_set(row: Tensor, *, top_p: float = 1.0, top_k: int = 10**9, min_p: float = 0.0) -> set[int]:
    """Apply the definition: walk down the sorted probabilities until `top_p`, `top_k` or `min_p` stops."""
    p = torch.softmax(row.double(), 0)
    kept: set[int] = set()
    total = 0.0
    for token in p.argsort(descending=True).tolist():
        if total > top_p or len(kept) >= top_k or p[token] < min_p * p.max():
            break
        kept.add(token)
        total += float(p[token])
    return kept


def test_draws_are_exactly_the_allowed_tokens() -> None:
    torch.manual_seed(3)
    row = torch.randn(300) * 2
    logits = row.expand(3000, -1)
    for options in ({"top_p": 0.3}, {"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.6, "top_k": 4}):
        assert set(draw(logits, **options).tokens.tolist()) == kept_set(row, **options), options
    # If the candidates that are sorted first do not hold top_p, all tokens are sorted.
    flat = torch.zeros(4000, 1500)
    drawn = set(draw(flat, top_p=0.9).tokens.tolist())
    assert 1100 < len(drawn) <= 1351
    # Control: without restrictions, draws leave the sets.
    assert not set(draw(logits).tokens.tolist()) <= kept_set(row, top_p=0.6, top_k=4)


def test_a_token_of_mass_zero_is_never_drawn() -> None:
    logits = torch.full((4096, 64), float("-inf"))
    logits[:, 10] = 0.0
    assert (draw(logits).tokens == 10).all()
    assert (draw(logits, top_k=1).tokens == 10).all()


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    torch.manual_seed(4)
    logits = torch.randn(50, 200)
    seeds = np.arange(50, dtype=np.uint64)
    whole = draw(logits, seed=seeds).tokens
    alone = np.concatenate([draw(logits[i : i + 1], seed=seeds[i : i + 1]).tokens for i in range(50)])
    assert (whole == alone).all()
    assert (whole != draw(logits, seed=seeds + np.uint64(1000)).tokens).any()


def test_the_generator_is_uniform() -> None:
    n = 100_000
    fixed = np.full(n, 3)
    for u in (
        uniform(np.arange(n, dtype=np.uint64), fixed),
        uniform(fixed.astype(np.uint64), np.arange(n)),
    ):
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 150  # 99 degrees of freedom
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


def test_rows_with_nonfinite_logits_are_reported() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = float("nan")
    logits[2, 2] = float("inf")
    assert draw(logits).finite.tolist() == [True, False, False]
