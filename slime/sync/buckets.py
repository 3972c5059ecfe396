"""Split a stream of whole tensors into buckets of bounded size.

- Where it sits: `megatron.model.hf_weights.iter_hf_tensors` gathers whole tensors under their HF names, and a transport
  sends the buckets.
- Invariant: the order is kept and no tensor is split, so every rank and every engine sees the same sequence. When the
  tensors of a bucket are laid out one after another as bytes, each begins at a multiple of its item size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

NamedTensor = tuple[str, torch.Tensor]


def buckets(tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Yield lists of named tensors of at most `max_bytes` each; a larger tensor gets a bucket of its own."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        # An engine takes a view of each tensor at its offset (SGLang does), which requires alignment to its item size.
        if bucket and (size + tensor.nbytes > max_bytes or size % tensor.itemsize):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
