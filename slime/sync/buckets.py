"""Cut a stream of whole tensors into buckets of bounded size.

- Where it sits: `megatron.model.hf_weights.iter_hf_tensors` gathers whole tensors under their HF names, and a transport
  sends the buckets. The place of each tensor in a bucket's bytes is in `engine.bucket_layout`, which engines read too.
- Invariant: the order is kept and no tensor is split, so every rank and every engine sees the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from slime.engine.bucket_layout import BucketLayout, NamedTensor


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
