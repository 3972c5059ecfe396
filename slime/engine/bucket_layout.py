"""BucketLayout: the place of each tensor in the bytes of a bucket of weights.

- Used by: `sync.buckets` cuts the stream of weights by it, transports fill buckets by it, and the embedded engine takes
  them apart. It is on this floor because engines read it too; the messages of `protocol` send it as three lists.
- Invariant: tensors lie one after another in the order of their names, without gaps, as in SGLang's load_format
  "flattened_bucket". In a bucket that `has_room` has cut, each begins at a multiple of its item size.

For example, a (2 x 3 values of bf16) and b (4 values of fp32) lie in 28 bytes: a in 0 to 12, b in 12 to 28.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NamedTensor = tuple[str, Tensor]


@dataclass(frozen=True)
class Place:
    """One tensor of a bucket: its name, dtype and shape, and its bytes from `begin` to before `end`."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int

    def put(self, flat: Tensor, tensor: Tensor) -> None:
        """Copy the tensor's bytes to this place in the bucket's bytes `flat`."""
        flat[self.begin : self.end].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))


class BucketLayout:
    """The places of a bucket's tensors, in order; it grows by `append`."""

    def __init__(self) -> None:
        self.places: list[Place] = []

    @classmethod
    def of(cls, tensors: Iterable[NamedTensor]) -> BucketLayout:
        """Return the layout of these tensors."""
        layout = cls()
        for name, tensor in tensors:
            layout.append(name, tensor.dtype, tensor.shape)
        return layout

    @classmethod
    def parse(cls, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> BucketLayout:
        """Return the layout that a message describes. Raises ValueError if a name is no dtype."""
        layout = cls()
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            layout.append(name, parse_dtype(dtype), shape)
        return layout

    def append(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Place:
        """Give a tensor the next place, and return it."""
        size = torch.Size(shape)
        begin = self.num_bytes
        place = Place(name, dtype, size, begin, begin + size.numel() * dtype.itemsize)
        self.places.append(place)
        return place

    def has_room(self, tensor: Tensor, max_bytes: int) -> bool:
        """Return whether `tensor` may be the next one: it begins aligned, and the bucket stays within `max_bytes`.

        The first tensor always may, however large it is.
        """
        size = self.num_bytes
        # An engine takes a view of each tensor at its offset (SGLang does), which requires alignment to its item size.
        return not self.places or (size + tensor.nbytes <= max_bytes and size % tensor.itemsize == 0)

    @property
    def num_bytes(self) -> int:
        """The size of the whole bucket."""
        return self.places[-1].end if self.places else 0

    @property
    def names(self) -> list[str]:
        """The names, as a message sends them."""
        return [place.name for place in self.places]

    @property
    def dtypes(self) -> list[str]:
        """The dtypes' names, as a message sends them."""
        return [dtype_name(place.dtype) for place in self.places]

    @property
    def shapes(self) -> list[list[int]]:
        """The shapes, as a message sends them."""
        return [list(place.shape) for place in self.places]

    def fill(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors' bytes to their places in `flat`, a uint8 tensor of `num_bytes`."""
        # Copy one tensor at a time, which is a plain memory copy; torch.cat copies byte by byte on a GPU.
        for place, tensor in zip(self.places, tensors, strict=True):
            place.put(flat, tensor)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a new uint8 tensor with the tensors' bytes; all are on one device."""
        flat = torch.empty(self.num_bytes, dtype=torch.uint8, device=tensors[0].device)
        self.fill(flat, tensors)
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return copies of the tensors in `flat`; this reverses `flatten`."""
        # Copies are needed: the bytes of one dtype may begin where another dtype cannot be viewed (alignment).
        return [flat[p.begin : p.end].clone().view(p.dtype).view(p.shape) for p in self.places]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name as SGLang writes it: 'float32'."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name. Raises ValueError if there is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype; write it as float32 or bfloat16")
    return dtype
