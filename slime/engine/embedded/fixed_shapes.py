"""Forward passes of fixed shapes: a request's result does not depend on the other requests, to the bit.

- Called by: with `--enable-deterministic-inference` the scheduler decodes and samples through this; otherwise it is not
  used.
- Invariant: every sum in a row's result has a shape and an order that the row's own request alone decides.

A matrix product rounds differently with another number of rows, and may do so differently for each row. So each prompt
is prefilled alone. Decoding takes rows in chunks of sizes that were measured to give equal bits for every row.
Attention over the cache works in blocks of one size, and a block after a row's own position adds nothing to the row.

For example, with sizes (64, 8): 70 running requests are decoded as one chunk of 64 rows and one of 8, of which 2 rows
are empty.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime.config.memory import EMBEDDED_ROW_STEP
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.engine.embedded.sampler import Draw, SamplingBatch, sample

logger = logging.getLogger(__name__)

SIZES = (64, 32, 16, 8, 4, 2)
"""The chunk sizes in rows that are tried, largest first."""
SPARE_ROWS = SIZES[0] - 1
"""Cache rows after those of requests, for the empty rows of a last chunk."""
_SHIFTS = (0, 1, 7)
"""Shifts of the rows, which test whether a row's position in the chunk changes its bits."""


class FixedShapes:
    """`sizes` are the rows of a chunk, in descending order, all of which give a row the same bits."""

    def __init__(self, model: Model, cache: KVCache, sizes: tuple[int, ...]) -> None:
        self._model = model
        self._cache = cache
        self.sizes = sizes

    def decode(self, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
        """Run one token for each of the first B cache rows, as `Model.decode`; return hidden states [B, hidden]."""
        hidden: list[Tensor] = []
        for first, count, size in self._chunks(len(tokens_B)):
            rows = slice(first, first + count)
            tokens, positions = _padded(tokens_B[rows], size), _padded(positions_B[rows], size)
            hidden.append(self._model.decode_in_blocks(tokens, positions, self._cache, first)[:count])
        return torch.cat(hidden)

    def sample(self, hidden_B: Tensor, batch: SamplingBatch) -> Draw:
        """Sample from the logits of `hidden_B`, as `sampler.sample` does."""
        count_all = len(hidden_B)
        draw = Draw(np.zeros(count_all, np.int64), np.zeros(count_all, np.float32), np.zeros(count_all, np.bool_))
        for first, count, size in self._chunks(count_all):
            logits = self._model.logits(_padded(hidden_B[first : first + count], size))
            rows = np.minimum(np.arange(first, first + size), first + count - 1)
            chunk = _rows_of(batch, rows)
            free = replace(chunk, top_p=np.ones(size), top_k=np.full(size, -1), min_p=np.zeros(size))
            _put(draw, rows[:count], sample(logits, free))
            # `sample` decides for all rows of a call together which candidates it sorts, so these rows go alone.
            for i in np.flatnonzero((chunk.top_p < 1) | (chunk.top_k > 0) | (chunk.min_p > 0)).tolist():
                if i < count:
                    _put(draw, rows[i : i + 1], sample(logits[i : i + 1].clone(), _rows_of(batch, rows[i : i + 1])))
        return draw

    def _chunks(self, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first row, rows, padded size): whole chunks, then the smallest size that holds the rest."""
        largest = self.sizes[0]
        for first in range(0, count, largest):
            rows = min(largest, count - first)
            yield first, rows, min(size for size in self.sizes if size >= rows)


def _padded(rows: Tensor, size: int) -> Tensor:
    """Copy `rows` into new memory (its alignment may choose the kernel), padded with zeros."""
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _rows_of(batch: SamplingBatch, rows: NDArray[np.int64]) -> SamplingBatch:
    return SamplingBatch(**{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})


def _put(draw: Draw, rows: NDArray[np.int64], found: Draw) -> None:
    """Write the first entries of `found` into `rows` of `draw`."""
    for f in fields(Draw):
        getattr(draw, f.name)[rows] = getattr(found, f.name)[: len(rows)]


def find_sizes(model: Model) -> tuple[int, ...]:
    """Measure the chunk sizes that give every row the same bits, for this machine, model and number of threads.

    Rows of many contents, lengths and positions are decoded in chunks of each size. A kernel that sums in another order
    shows in some of their thousands of numbers. A size of 1 always qualifies.
    """
    probe = copy.copy(model)
    probe.layers = [model.layers[0], model.layers[-1]]  # other layers have the same shapes as one of these
    count, a = SIZES[0], model.architecture
    length = min(2 * EMBEDDED_ROW_STEP + 7, a.max_position_embeddings)
    rng = torch.Generator().manual_seed(0)
    prompt, tokens = torch.randint(a.vocab_size, (2, max(length, count)), generator=rng)
    positions = torch.randint(length // 2, length, (count,), generator=rng)
    with torch.inference_mode():
        shallow = replace(a, num_layers=len(probe.layers))
        cache = KVCache(shallow, dtype=model.dtype, rows=count, tokens=count * 3 * EMBEDDED_ROW_STEP)
        cache.reserve(length, in_use=0)
        found: dict[int, bytes] = {}
        for size in SIZES:
            shifted = [_bits(probe, cache, prompt[:length], tokens[:count], positions, size, by) for by in _SHIFTS]
            if all(bits == shifted[0] for bits in shifted):
                found[size] = shifted[0]
    alike = tuple(size for size in found if found[size] == found[max(found)]) or (1,)
    logger.info("deterministic: chunks of %s rows give equal bits", ", ".join(map(str, alike)))
    return alike


def _bits(
    model: Model, cache: KVCache, prompt: Tensor, tokens_B: Tensor, positions_B: Tensor, size: int, shift: int
) -> bytes:
    """Return the bits of hidden states, logits and log-probs of rows after one prompt, computed `shift` rows later."""
    model.prefill([prompt.tolist()], cache, 0)
    cache.copy(0, 1, len(prompt), rows=len(tokens_B) - 1)
    tokens_B, positions_B = tokens_B.roll(shift), positions_B.roll(shift)
    rows: list[Tensor] = []
    for first in range(0, len(tokens_B), size):
        chunk = slice(first, first + size)
        hidden = model.decode_in_blocks(tokens_B[chunk].clone(), positions_B[chunk].clone(), cache, first)
        logits = model.logits(hidden)
        log_probs = torch.from_numpy(sample(logits, _settings(positions_B[chunk])).log_probs)
        rows.append(torch.cat([hidden.float(), logits, log_probs[:, None]], dim=1))
    return torch.cat(rows).roll(-shift, dims=0).numpy().tobytes()


def _settings(positions_B: Tensor) -> SamplingBatch:
    count = len(positions_B)
    return SamplingBatch(
        temperature=np.full(count, 0.8),
        top_p=np.ones(count),
        top_k=np.full(count, -1),
        min_p=np.zeros(count),
        seed=np.zeros(count, dtype=np.uint64),
        position=positions_B.numpy(),
    )
