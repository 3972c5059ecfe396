"""Buckets: nothing lost, nothing reordered, none above its size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.sync.stream import buckets


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 100))
def test_buckets_keep_order_and_size(sizes: list[int], max_bytes: int) -> None:
    tensors = [(f"w{i}", torch.zeros(size)) for i, size in enumerate(sizes)]
    result = list(buckets(tensors, max_bytes))
    assert [name for bucket in result for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in result:
        assert bucket
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= max_bytes
