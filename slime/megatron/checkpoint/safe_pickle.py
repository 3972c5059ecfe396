"""Read the pickles in a torch_dist checkpoint without executing anything that is in them.

- Used by: `torch_dist` and `files` read `.metadata`, `common.pt` and the objects in `*.distcp` through here.
- Invariant: a class that is not listed here is neither imported nor called. The error names the class and its file.

There are two readers, because there are two kinds of files:

- `.metadata` is a plain pickle. Each listed class is replaced by a substitute that only keeps its arguments. The real
  `Metadata` is then built from checked numbers and names, so no method of a real class runs on data from the file.
- `common.pt` and objects are written by `torch.save`. The names in them are first compared with a list. Then
  `torch.load(weights_only=True)` reads them, which has a restricted instruction set for this.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA = ".metadata"
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DCP = "torch.distributed.checkpoint"
_OLD_DCP = "torch.distributed._shard.sharded_tensor.metadata"
_MEMORY_FORMATS = frozenset({f"{_DCP}.metadata._MEM_FORMAT_ENCODING", f"{_OLD_DCP}.MEM_FORMAT_ENCODING"})
"""The only Enums in `.metadata`; the second one is from before torch 2.3."""
_METADATA_CLASSES = frozenset(
    {
        *_MEMORY_FORMATS,
        *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *(f"{_DCP}.metadata.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *(f"{_DCP}.metadata.{name}" for name in ("ChunkStorageMetadata", "TensorProperties")),
        f"{_DCP}.filesystem._StorageInfo",
        f"{_OLD_DCP}.TensorProperties",  # before torch 2.3
        "torch.Size",
        "torch.serialization._get_layout",
        *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath")),
        *(f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")),  # Python 3.13
    }
)
_OBJECT_CLASSES = frozenset(
    {
        *_DTYPES,
        *(f"torch.{name}" for name in vars(torch) if name.endswith("Storage")),
        "torch.storage.UntypedStorage",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor_v2",
        "collections.OrderedDict",
        "argparse.Namespace",
        "types.SimpleNamespace",
        "pathlib.PosixPath",
        "signal.Signals",
        "_codecs.encode",  # how protocol 2 writes bytes
        # numpy's random states
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *("numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType"),
        # what Megatron's training script stores in common.pt
        "megatron.core.enums.ModelType",
        *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphScope")),
        *(f"megatron.core.rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    }
)
_MAX_BYTES = 2**63 - 1
_MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)
"""The exceptions that pickle readers raise on bytes that are not a pickle, or not the expected one."""


class UnsafeFileError(ValueError):
    """A checkpoint file holds a class that is not listed, a path out of its directory, or impossible sizes."""


class UnreadableFileError(ValueError):
    """A checkpoint file is damaged, or is not what its name promises."""


def forbidden(names: Iterable[str]) -> UnsafeFileError:
    """Return the error about classes that are not listed; it does not name the file."""
    return UnsafeFileError(
        f"holds {', '.join(sorted(names))}, which neither torch nor Megatron writes into a checkpoint; "
        "nothing in it was executed; take a checkpoint from somebody you trust"
    )


# .metadata


class _StandIn:
    """Keeps what a pickle passes to a class, and does nothing else."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _StandIn:
        made = object.__new__(cls)
        made.args, made.state = args, {}
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler whose substitutes exist for one file only, so that one file cannot change another's."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._kinds: dict[str, type[_StandIn]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in _DTYPES:
            return _DTYPES[name]
        if name == "builtins.getattr":
            return self._member
        if name not in _METADATA_CLASSES:
            raise forbidden([name])
        return self._kinds.setdefault(name, type(global_name, (_StandIn,), {}))

    def _member(self, kind: Any, name: Any) -> Any:
        """Return a substitute for a memory format, which Debian's Python 3.11.2 pickles as getattr(class, name)."""
        formats = [self._kinds[known] for known in _MEMORY_FORMATS & self._kinds.keys()]
        if kind not in formats or type(name) is not str:
            raise forbidden(["builtins.getattr"])
        return kind(name)


def read_metadata(directory: Path) -> Metadata:
    """Read `.metadata` of a torch_dist checkpoint: its tensors, and which bytes of which file hold them.

    Raises:
        UnsafeFileError: it names a class that is not listed, a file outside `directory`, or impossible sizes.
        UnreadableFileError: it is damaged.
        OSError: there is no such file.
    """
    file = directory / METADATA
    data = file.read_bytes()
    try:
        return _as_metadata(_MetadataUnpickler(data).load())
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{file}: {error}") from None
    except _MALFORMED as error:
        raise UnreadableFileError(f"{file}: cannot be read ({first_line(error)}); restore the file") from error


def _as_metadata(raw: Any) -> Metadata:
    """Build the Metadata; raises ValueError, or another of _MALFORMED, if a part is not what it should be."""
    state = _state(raw, "Metadata")
    described = {_text(key): _description(_text(key), value) for key, value in _items(state["state_dict_metadata"])}
    places = dict(_place(described, index, info) for index, info in _items(state["storage_data"]))
    return Metadata(state_dict_metadata=described, storage_data=places, version=state.get("version"))


def _state(value: Any, kind: str) -> dict[str, Any]:
    if not isinstance(value, _StandIn) or type(value).__name__ != kind or not isinstance(value.state, dict):
        raise ValueError(f"{type(value).__name__} in place of {kind}")
    return value.state


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} in place of a dictionary")
    yield from value.items()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} in place of a name")
    return value


def _sizes(value: Any) -> torch.Size:
    """Check a shape or an offset."""
    sizes = value.args[0] if isinstance(value, _StandIn) and type(value).__name__ == "Size" else value
    if not isinstance(sizes, tuple | list) or not all(type(size) is int and 0 <= size <= _MAX_BYTES for size in sizes):
        raise ValueError(f"{sizes!r} in place of a shape")
    return torch.Size(sizes)


def _description(key: str, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    state = _state(value, "TensorStorageMetadata")
    properties = state["properties"]
    stored = properties.state if isinstance(properties, _StandIn) else None
    dtype = stored[0] if isinstance(stored, tuple) else stored["dtype"] if isinstance(stored, dict) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no dtype")
    size = _sizes(state["size"])
    if math.prod(size) * dtype.itemsize > _MAX_BYTES:
        raise UnsafeFileError(f"{key} has the impossible shape {tuple(size)}")
    chunks = [
        ChunkStorageMetadata(offsets=_sizes(part["offsets"]), sizes=_sizes(part["sizes"]))
        for part in (_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"])
    ]
    for chunk in chunks:
        ends = [offset + length for offset, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise UnsafeFileError(f"{key} of shape {tuple(size)} has a part that ends at {tuple(ends)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place(described: dict[str, Any], index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    """Check one piece: the tensor that it belongs to, and the place of its bytes."""
    key, where = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    name, file = _text(key["fqn"]), _text(where["relative_path"])
    offset, length = where["offset"], where["length"]
    if not file or file in (".", "..") or "/" in file or "\\" in file or "\0" in file:
        raise UnsafeFileError(f"{name} is stored in {file!r}, which is not a file of this directory")
    if any(type(number) is not int or not 0 <= number <= _MAX_BYTES for number in (offset, length)):
        raise UnsafeFileError(f"{name} is stored as {length!r} bytes at {offset!r} of {file}")
    if where.get("transform_descriptors"):
        raise UnsafeFileError(f"{name} is stored with {where['transform_descriptors']!r}, which is not supported")
    place = None if key.get("offset") is None else _sizes(key["offset"])
    tensor = described.get(name)
    if isinstance(tensor, TensorStorageMetadata):
        parts = [chunk.sizes for chunk in tensor.chunks if chunk.offsets == place]
        needed = max((math.prod(sizes) for sizes in parts), default=0) * tensor.properties.dtype.itemsize
        if needed > length:
            raise UnsafeFileError(f"{name} should have {needed} bytes, and {file} has {length} for it")
    number = key.get("index")
    return MetadataIndex(name, place, number if type(number) is int else None), _StorageInfo(file, offset, length)


# What torch.save writes


class _Anything:
    """A placeholder for every class while names are collected."""

    def __new__(cls, *args: Any) -> _Anything:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass


class _Names(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.found: set[str] = set()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        module_name = IMPORT_MAPPING.get(module_name, module_name)  # torch.save writes the names of Python 2
        self.found.add(f"{module_name}.{global_name}")
        return type("_", (_Anything,), {})

    def persistent_load(self, pid: Any, /) -> Any:
        return _Anything()


def _check_classes(pickled: bytes) -> None:
    """Raise UnsafeFileError if a pickle names a class or function that is not listed."""
    names = _Names(pickled)
    with contextlib.suppress(*_MALFORMED):  # read up to the damage; the real reader reports the reason
        names.load()
    if names.found - _OBJECT_CLASSES:
        raise forbidden(names.found - _OBJECT_CLASSES)


def load_objects(file: IO[bytes]) -> Any:
    """Read what `torch.save` wrote: plain values, tensors on the CPU, listed classes. Errors do not name the file.

    Raises:
        UnsafeFileError: it holds another class.
        UnreadableFileError: it is damaged, or `torch.save` did not write it.
    """
    data = file.read()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    except (OSError, NotImplementedError, *_MALFORMED):
        _check_classes(data)
        raise UnreadableFileError("cannot be read (torch.save did not write it); restore the file") from None
    for pickled in pickles:
        _check_classes(pickled)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _MALFORMED as error:
        raise UnreadableFileError(f"cannot be read ({first_line(error)}); restore the file") from error


def first_line(error: BaseException) -> str:
    """Return the error as one line of bounded length; torch adds a page of advice about trusted files to its own."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
