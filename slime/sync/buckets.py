"""Cut a stream of whole tensors into buckets of bounded size.

- Where it sits: `megatron.model.hf_weights.iter_hf_tensors` gathers whole tensors under their HF names, and a transport
  sends the buckets. The place of each tensor in a bucket's bytes is in `engine.bucket_layout`, which engines read too.
- Invariant: the order is kept and no tensor is split, so every rank and every engine sees the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from slime.engine.bucket_layout import BucketLayout, NamedTensor
from slime.engine.weight_group import Filled, filled


@dataclass(frozen=True)
class Bucket:
    """Whole tensors that are sent together, and their layout."""

    layout: BucketLayout = field(default_factory=BucketLayout)
    tensors: list[Tensor] = field(default_factory=list[Tensor])


class Buckets(Iterator[Bucket]):
    """The buckets of a stream of tensors, of at most `max_bytes` each; a larger tensor gets a bucket of its own.

    The last bucket of a set carries the policy version, so a sender has to know that it is the last. `at_end` finds
    that out by taking the next bucket from the stream.
    """

    def __init__(self, tensors: Iterable[NamedTensor], max_bytes: int) -> None:
        self._buckets = _cut(tensors, max_bytes)
        self._ahead: list[Bucket] = []
        """The bucket that `at_end` has taken from the stream, if it has."""

    def __next__(self) -> Bucket:
        return self._ahead.pop() if self._ahead else next(self._buckets)

    def at_end(self) -> bool:
        """Return whether there are no more buckets."""
        if not self._ahead:
            self._ahead = list(islice(self._buckets, 1))
        return not self._ahead


def _cut(tensors: Iterable[NamedTensor], max_bytes: int) -> Iterator[Bucket]:
    bucket = Bucket()
    for name, tensor in tensors:
        if not bucket.layout.has_room(tensor, max_bytes):
            yield bucket
            bucket = Bucket()
        bucket.layout.append(name, tensor.dtype, tensor.shape)
        bucket.tensors.append(tensor)
    if not bucket.tensors:
        raise RuntimeError("the model has no weights")
    yield bucket


@dataclass(frozen=True)
class FlatBucket:
    """A bucket's bytes in one tensor of uint8, with the layout that engines need to split it."""

    number: int
    layout: BucketLayout
    flat: Tensor
    filled: Filled
    last: bool


class FlatBuckets:
    """Fills two buffers in turn from streams of the same tensors, one stream at each sync.

    A tensor is copied as soon as it comes, so beyond the two buffers no bucket is held in memory. For example, with
    room for two tensors in a buffer, the stream a, b, c, d, e becomes (a, b) in buffer 0, (c, d) in buffer 1 and (e) in
    buffer 0 again, which is the last.
    """

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` is the size of a bucket; a larger tensor gets a bucket of its own."""
        self._max_bytes = max_bytes
        self._largest = 0
        """The bytes of the largest bucket of the stream before; 0 if there was none."""

    def fill(self, tensors: Iterable[NamedTensor], *, wait_until_free: Callable[[int], None]) -> Iterator[FlatBucket]:
        """Yield the buckets of a stream.

        `wait_until_free` gets the number of the bucket that is about to be filled, and returns once the bytes of the
        bucket two before it, which lie in the same buffer, may be overwritten.

        Raises:
            RuntimeError: there is no tensor.
        """
        size = self._largest or self._max_bytes
        most = min(size, self._max_bytes)  # the same cuts as before: no bucket but one with a single tensor is larger
        buffers: list[Tensor | None] = [None, None]
        layouts: list[BucketLayout] = []
        flat: Tensor | None = None
        layout = BucketLayout()
        for name, tensor in tensors:
            if flat is None or not layout.has_room(tensor, most):
                if flat is not None:
                    yield _flat(layouts, layout, flat, last=False)
                    layout = BucketLayout()
                wait_until_free(len(layouts))
                flat = buffers[len(layouts) % 2]
                if flat is None or flat.numel() < tensor.nbytes or flat.device != tensor.device:
                    flat = torch.empty(max(size, tensor.nbytes), dtype=torch.uint8, device=tensor.device)
                    buffers[len(layouts) % 2] = flat
            layout.append(name, tensor.dtype, tensor.shape).put(flat, tensor)
        if flat is None:
            raise RuntimeError("the model has no weights")
        yield _flat(layouts, layout, flat, last=True)
        self._largest = max(each.num_bytes for each in layouts)


def _flat(layouts: list[BucketLayout], layout: BucketLayout, flat: Tensor, *, last: bool) -> FlatBucket:
    layouts.append(layout)
    return FlatBucket(len(layouts) - 1, layout, flat[: layout.num_bytes], filled(flat), last)
