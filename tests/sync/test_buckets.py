"""Buckets lose nothing, keep the order, stay within their size, and the last one is known as such."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.sync.buckets import Buckets

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), DTYPES), min_size=1, max_size=20), st.integers(1, 100))
def test_buckets_keep_order_and_size(kinds: list[tuple[int, torch.dtype]], max_bytes: int) -> None:
    tensors = [(f"w{i}", torch.randn(size).to(dtype)) for i, (size, dtype) in enumerate(kinds)]
    result = list(Buckets(tensors, max_bytes))
    assert [name for bucket in result for name in bucket.layout.names] == [name for name, _ in tensors]
    for bucket in result:
        sizes = [tensor.nbytes for tensor in bucket.tensors]
        assert sizes and (len(sizes) == 1 or sum(sizes) <= max_bytes)
        assert bucket.layout.num_bytes == sum(sizes)
        flat = bucket.layout.flatten(bucket.tensors)
        begin = 0
        for tensor in bucket.tensors:  # as SGLang views it in the bucket's bytes
            assert begin % tensor.itemsize == 0
            assert torch.equal(flat[begin:][: tensor.nbytes].view(tensor.dtype), tensor)
            begin += tensor.nbytes


def test_the_last_bucket_is_known_as_such() -> None:
    def stream() -> list[NamedTensor]:
        return [(str(i), torch.zeros(1)) for i in range(3)]

    buckets = Buckets(stream(), max_bytes=4)
    ends = [(bucket.layout.names, buckets.at_end(), buckets.at_end()) for bucket in buckets]
    assert ends == [(["0"], False, False), (["1"], False, False), (["2"], True, True)]
    assert [bucket.layout.names for bucket in Buckets(stream(), max_bytes=8)] == [["0", "1"], ["2"]], "not asked"
    with pytest.raises(RuntimeError, match="no weights"):
        next(Buckets([], max_bytes=4))


def test_a_message_describes_the_same_layout() -> None:
    """An engine splits by the names, dtypes and shapes of a message: any dtype at any offset, and scalars."""
    tensors = [
        ("bytes", torch.arange(3, dtype=torch.uint8)),
        ("scalar", torch.tensor(2.5)),
        ("none", torch.zeros(0, 4, dtype=torch.bfloat16)),
        ("turned", torch.randn(2, 3).bfloat16().T),
    ]
    sent = BucketLayout.of(tensors)
    received = BucketLayout.parse(sent.names, sent.dtypes, sent.shapes)
    assert received.places == sent.places and received.num_bytes == 3 + 4 + 0 + 12
    own = [tensor for _, tensor in tensors]
    for there, here in zip(received.split(sent.flatten(own)), own, strict=True):
        assert there.dtype == here.dtype and torch.equal(there, here)
    with pytest.raises(ValueError, match="'float33' is no dtype"):
        BucketLayout.parse(["a"], ["float33"], [[1]])
