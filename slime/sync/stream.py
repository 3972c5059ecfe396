"""From a stream of whole tensors to buckets of bounded size.

Path: `megatron.hf_weights.iter_hf_tensors` gathers one tensor at a time under its HF name; a transport sends the
buckets. Invariant: order is kept and nothing is split, so every rank and every engine sees the same sequence.
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
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
