"""SFT on packed rows against Hugging Face in float64, row by row: loss and gradients, per sample and per token.

Many short rows share a micro-batch, a row over the budget has one of its own, masked tokens have weight 0, and a row
without any unmasked token is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import Arrays, difference
from worker_pool import WorkerPool

from slime.core.batch import TrainBatch

pytestmark = pytest.mark.dist

NUM_SHORT = 40
LONG = 300
EMPTY = 7
"""The row whose response is masked throughout."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    """Make rows of 3 to 9 tokens and a long one after them; masks begin and end anywhere, as in dialogues."""
    rng = np.random.default_rng(3)
    responses = np.append(rng.integers(1, 6, NUM_SHORT), LONG - 20)
    totals = np.append(responses[:-1] + rng.integers(2, 5, NUM_SHORT), LONG)
    mask = (rng.random(responses.sum()) > 0.4).astype(np.float32)
    starts = np.cumsum(responses) - responses
    mask[starts + rng.integers(0, responses)] = 1
    mask[starts[EMPTY] : starts[EMPTY + 1]] = 0
    columns = {
        "tokens": rng.integers(0, tiny.VOCAB, totals.sum()),
        "loss_mask": mask,
        "rewards": np.zeros(len(totals), dtype=np.float32),
        "group_indices": np.arange(len(totals)),
        "sample_indices": np.arange(len(totals)),
    }
    return TrainBatch(totals, responses, columns)


def plain(
    batch: TrainBatch, *, per_token: bool, shown: Callable[[np.ndarray], np.ndarray] = lambda mask: mask
) -> tuple[float, Arrays]:
    """Return loss and gradients of the mean negative log-likelihood of unmasked response tokens, one row at a time.

    Per sample it is the mean over each row's tokens, then over the rows that have any. `shown` changes a row's mask.
    """
    model = tiny.hf_model("qwen3").double()
    sums: list[torch.Tensor] = []
    counts: list[float] = []
    for tokens, length, mask in zip(
        batch.rows("tokens"), batch.response_lengths_N, batch.rows("loss_mask"), strict=True
    ):
        logits = model(torch.from_numpy(tokens)[None]).logits[0]
        answers = torch.from_numpy(tokens[-length:])
        log_probs = logits[-length - 1 : -1].log_softmax(-1).gather(1, answers[:, None])[:, 0]
        seen = torch.from_numpy(shown(mask)).double()
        sums.append(-(log_probs * seen).sum())
        counts.append(seen.sum().item())
    if per_token:
        loss = torch.stack(sums).sum() / sum(counts)
    else:
        loss = torch.stack([total / count for total, count in zip(sums, counts, strict=True) if count]).mean()
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_token", [False, True])
def test_packed_rows_are_independent(workers: WorkerPool, hf: Path, batch: TrainBatch, per_token: bool) -> None:
    """All short rows share one micro-batch, the long one has another; two ranks give the same result."""
    loss, gradients = plain(batch, per_token=per_token)
    args = tiny.make_args(
        hf, loss_type="sft_loss", calculate_per_token_loss=per_token, max_tokens_per_gpu=LONG - 1, clip_grad=0.0
    )
    [found] = workers.run(1, runs.train, args, [batch])
    assert found.metrics[0]["train/num_micro_batches"] == 2
    assert int(batch.total_lengths_N[:NUM_SHORT].sum()) < LONG - 1
    assert found.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-6)
    assert difference(found.gradients, gradients) < 1e-5

    # the long row has a rank of its own, which then adds padding: the other rank needs several micro-batches
    many = tiny.make_args(
        hf,
        loss_type="sft_loss",
        calculate_per_token_loss=per_token,
        max_tokens_per_gpu=64,
        clip_grad=0.0,
        balance_data=True,
        actor_num_gpus_per_node=2,
    )
    for found in workers.run(2, runs.train, many, [batch]):
        assert found.metrics[0]["train/num_micro_batches"] == 4
        assert found.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-6)
        assert difference(found.gradients, gradients) < 1e-5

    # controls: a mask shifted by one, no mask, the other mean
    for wrong in (
        plain(batch, per_token=per_token, shown=lambda mask: np.roll(mask, 1)),
        plain(batch, per_token=per_token, shown=np.ones_like),
        plain(batch, per_token=not per_token),
    ):
        assert abs(wrong[0] / loss - 1) > 1e-4
        assert difference(wrong[1], gradients) > 1e-2
