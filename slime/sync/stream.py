"""From a stream of whole tensors to buckets of bounded size.

Path: `megatron.hf_weights.iter_hf_tensors` gathers whole tensors under their HF names; a transport sends the buckets.
Invariants: order is kept and nothing is split, so every rank and every engine sees the same sequence; behind each
other as bytes, every tensor of a bucket begins where its dtype may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

NamedTensor = tuple[str, torch.Tensor]


def buckets(tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[list[NamedTensor]]:
    """Lists of named tensors of at most `max_bytes` each; a larger tensor goes alone."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        # An engine views each tensor where it lies (SGLang does), and cannot at a fraction of its dtype.
        if bucket and (size + tensor.nbytes > max_bytes or size % tensor.itemsize):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
