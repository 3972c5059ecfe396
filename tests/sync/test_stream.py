"""Buckets lose nothing, keep the order, and stay within their size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from slime.sync.buckets import buckets

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])


@given(st.lists(st.tuples(st.integers(0, 40), DTYPES), max_size=20), st.integers(1, 100))
def test_buckets_keep_order_and_size(kinds: list[tuple[int, torch.dtype]], max_bytes: int) -> None:
    tensors = [(f"w{i}", torch.zeros(size, dtype=dtype)) for i, (size, dtype) in enumerate(kinds)]
    result = list(buckets(tensors, max_bytes))
    assert [name for bucket in result for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in result:
        assert bucket
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= max_bytes
        begin = 0
        for _, tensor in bucket:  # as SGLang views it in the bucket's bytes
            assert begin % tensor.itemsize == 0
            begin += tensor.nbytes
