"""Buckets lose nothing, keep the order, stay within their size, and the last one is known as such."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.sync.buckets import Buckets, FlatBuckets
from slime.sync.in_flight import Announcements

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


Kinds = list[tuple[int, torch.dtype]]


def made(kinds: Kinds) -> list[NamedTensor]:
    return [(f"w{i}", torch.randn(size).to(dtype)) for i, (size, dtype) in enumerate(kinds)]


def read(tensors: list[NamedTensor], buckets: FlatBuckets, *, late: int) -> tuple[list[NamedTensor], list[list[str]]]:
    """Return the tensors as an engine finds them in the buckets, and each bucket's names.

    A bucket is read `late` buckets after it was filled, as late as the buckets allow with 1.
    """
    waiting: list[Any] = []
    found: list[NamedTensor] = []
    names: list[list[str]] = []

    def take(count: int) -> None:
        while len(waiting) > count:
            bucket = waiting.pop(0)
            parsed = BucketLayout.parse(bucket.layout.names, bucket.layout.dtypes, bucket.layout.shapes)
            found.extend(zip(parsed.names, parsed.split(bucket.flat), strict=True))

    lasts: list[bool] = []
    for number, bucket in enumerate(buckets.fill(tensors, wait_until_free=lambda number: take(late))):
        assert bucket.number == number and len(bucket.flat) == bucket.layout.num_bytes
        waiting.append(bucket)
        names.append(bucket.layout.names)
        lasts.append(bucket.last)
    take(0)
    assert lasts == [False] * (len(lasts) - 1) + [True]
    return found, names


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), DTYPES), min_size=1, max_size=20), st.integers(1, 100))
def test_two_buffers_hold_two_buckets_in_flight(kinds: Kinds, max_bytes: int) -> None:
    buckets = FlatBuckets(max_bytes)
    expected = [bucket.layout.names for bucket in Buckets(made(kinds), max_bytes)]
    for _ in range(3):  # from the second stream on the buffers are as large as the largest bucket
        tensors = made(kinds)
        found, names = read(tensors, buckets, late=1)
        assert names == expected
        assert [name for name, _ in found] == [name for name, _ in tensors]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, tensors, strict=True))


def test_a_third_bucket_overwrites_the_first() -> None:
    tensors = made([(4, torch.float32)] * 5)
    found, _ = read(tensors, FlatBuckets(16), late=2)  # the control: nobody waits for the buffer
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(found, tensors, strict=True))
    with pytest.raises(RuntimeError, match="no weights"):
        next(FlatBuckets(16).fill([], wait_until_free=lambda number: None))


def test_announcements_are_made_once_and_describe_each_bucket() -> None:
    announcements, buckets = Announcements("group"), FlatBuckets(32)

    def announced(tensors: list[NamedTensor], version: str) -> list[bytes]:
        filled = buckets.fill(tensors, wait_until_free=lambda number: None)
        return [announcements.of(bucket, version) for bucket in filled]

    first = announced(made([(4, torch.float32)] * 5), "1")
    second = announced(made([(4, torch.float32)] * 5), "2")
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, True, False]
    bodies = [orjson.loads(body) for body in second]
    assert [body["names"] for body in bodies] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert [body.get("weight_version") for body in bodies] == [None, None, "2"]
    assert all(body["load_format"] == "flattened_bucket" and not body["flush_cache"] for body in bodies)
    other = orjson.loads(announced(made([(2, torch.float32)] * 5), "3")[0])
    assert other["shapes"] == [[2]] * 4, "another model is announced as it is"
