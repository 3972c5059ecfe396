"""The part of SGLang's protocol for engines on the trainers' own devices: their memory, and weights in that memory.

- Used by: like `protocol`; `sync.colocate` and the rollout manager send these messages.
- Invariant: field names are SGLang's. Only `shared_memory` is the embedded engine's own, which unpickles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slime.engine.message import Message
from slime.engine.protocol import require_bucket

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
"""A part of an engine's memory that it can give back and take again."""
MEMORY_FILE = "slime-weights"
"""The name of memory files that hold a `SharedBucket`; the embedded engine opens no other files."""


@dataclass(frozen=True, kw_only=True)
class SharedBucket(Message):
    """The place of a bucket of weights in the memory of the sender's machine: tensors one after another, in order.

    `path` is the sender's anonymous memory file (memfd), as `/proc/<its process>/fd/<number>`.
    """

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def __post_init__(self) -> None:
        require_bucket(self.names, self.dtypes, self.shapes)


@dataclass(frozen=True, kw_only=True)
class UpdateWeightsFromTensor(Message):
    """The request to load one bucket from memory on the engine's own device.

    SGLang takes `serialized_named_tensors`: for each of its TP ranks, in order, a pickled handle of memory on that
    rank's GPU, as base64. The embedded engine unpickles nothing and takes `shared_memory` instead.
    """

    serialized_named_tensors: list[str] | None = None
    shared_memory: SharedBucket | None = None
    load_format: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None

    def __post_init__(self) -> None:
        if (self.serialized_named_tensors is None) == (self.shared_memory is None):
            raise ValueError("weights come either as serialized_named_tensors or as shared_memory")

    @classmethod
    def from_json(cls, data: Any) -> UpdateWeightsFromTensor:
        if isinstance(data, Mapping) and data.get("shared_memory") is not None:
            data = {**data, "shared_memory": SharedBucket.from_json(data["shared_memory"])}
        return super().from_json(data)

    def to_json(self) -> dict[str, Any]:
        shared = self.shared_memory
        return super().to_json() | ({} if shared is None else {"shared_memory": shared.to_json()})


@dataclass(frozen=True, kw_only=True)
class MemoryOccupation(Message):
    """The request to give memory back, or to take it again (None: all). Values of weights are undefined after that."""

    tags: list[MemoryTag] | None = None

    def __post_init__(self) -> None:
        known = get_args(MemoryTag)
        if self.tags is not None and not (isinstance(self.tags, list) and all(tag in known for tag in self.tags)):
            raise ValueError(f"tags is {repr(self.tags)[:100]}; it has to be a list of {', '.join(known)}")

    @property
    def chosen(self) -> list[MemoryTag]:
        return list(self.tags or get_args(MemoryTag))
