"""The torch_dist format: written with a digest of each file, read through `safe_pickle`.

- Used by: `snapshot` writes with these functions, each rank its share; `save_load` loads.
- Invariant: no file goes through a reader of torch or Megatron that would unpickle everything in it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import _validate_global_plan, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import load_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from slime.megatron.checkpoint.safe_pickle import (
    UnreadableFileError,
    UnsafeFileError,
    first_line,
    forbidden,
    load_objects,
    read_metadata,
)

COMMON = "common.pt"
FORMAT = "torch_dist"
_ALONE = 2**20
"""A write of at least this many bytes is digested in a second thread while it is written."""


# Writing


class _DigestedFile(io.BufferedWriter):
    """A file that digests what is written to it."""

    def __init__(self, path: Path, helper: ThreadPoolExecutor) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._digest = xxhash.xxh3_128()
        self._helper = helper

    def write(self, data: Any, /) -> int:
        if memoryview(data).nbytes < _ALONE:
            self._digest.update(data)
            return super().write(data)
        digested = self._helper.submit(self._digest.update, data)  # writing and digesting both release the GIL
        try:
            return super().write(data)
        finally:
            digested.result()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _DigestedFiles(FileSystem):
    """torch's access to files, with the digest of each finished file by name in `digests`."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with ThreadPoolExecutor(1) as helper, _DigestedFile(Path(path), helper) as stream:
            yield stream
        self.digests[Path(path).name] = stream.hexdigest()


def own_part(sharded: dict[str, Any]) -> dict[str, list[ShardedBase]]:
    """Return by key what this rank writes of a sharded state dict. Collective.

    Tensors that data-parallel ranks share are distributed evenly over these ranks. The optimizer's own shares are not a
    regular grid, and no other rank has them.
    """
    group = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    assert isinstance(group, ProcessGroup)
    tensors = (part for part in nested_values(sharded) if isinstance(part, ShardedTensor))
    shared: Any = [part for part in tensors if part.has_regular_grid]
    placed = determine_main_replica_uniform_distribution(shared, group)
    distribute_main_replicas_with_precomputed_distribution(shared, group, placed)
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return dict(by_key)


def tensors_of(part: Mapping[str, Sequence[ShardedBase]]) -> list[Any]:
    """Return the sharded tensors of `own_part`, whose `data` may be replaced by copies."""
    return [shard for shards in part.values() for shard in shards if isinstance(shard, ShardedTensor)]


@dataclass(frozen=True)
class Share:
    """The share that one rank writes: its planner holds the bytes, and `plan` their places in the whole tensors."""

    planner: MCoreSavePlanner
    plan: SavePlan

    @classmethod
    def of(cls, part: dict[str, list[ShardedBase]]) -> Share:
        """Plan the writing of `own_part`; objects are turned into bytes here."""
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(part, False), is_coordinator=dist.get_rank() == 0)
        return cls(planner, planner.create_local_plan())


@dataclass(frozen=True)
class WrittenShare:
    """The share that one rank has written: the plan, where each item is, and the digests of its files."""

    plan: SavePlan
    results: list[WriteResult]
    digests: dict[str, str]


def write_share(directory: Path, share: Share) -> WrittenShare:
    """Write this rank's file into the directory."""
    # 0: without the copies ahead that torch makes on a device's stream
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    files = writer.fs = _DigestedFiles()
    rank = dist.get_rank()
    plan = writer.prepare_global_plan([share.plan] * (rank + 1))[rank]  # torch names the files by the place in the list
    results = writer.write_data(plan, share.planner).wait()
    return WrittenShare(share.plan, results, files.digests)


def write_metadata(directory: Path, shares: Sequence[WrittenShare], common: bytes) -> None:
    """Write the files that make the shares of all ranks one checkpoint; `common` is the file of settings.

    Raises:
        ValueError: the shares overlap, or leave something out.
    """
    plans, metadata = create_default_global_save_plan([share.plan for share in shares])
    # the empty plan: torch looks for gaps only if there are several ranks
    if errors := _errors_of(_validate_global_plan([*plans, SavePlan([])], metadata)):
        raise ValueError(f"the shares of the ranks do not fit together: {'; '.join(errors[:3])}")
    FileSystemWriter(directory).finish(metadata, [share.results for share in shares])
    (directory / COMMON).write_bytes(common)
    config = {"sharded_backend": FORMAT, "sharded_backend_version": 1}
    (directory / CONFIG_FNAME).write_text(json.dumps(config | {"common_backend": "torch", "common_backend_version": 1}))


def _errors_of(validated: Any) -> list[str]:
    """Return the errors of a plan: torch 2.13 returns them, torch 2.11 logs them and returns whether there are none."""
    if isinstance(validated, bool):
        return [] if validated else ["torch's warnings above name the tensors"]
    return list(validated)


# Reading


class _Reader(FileSystemReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._directory = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(self._directory)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read like torch, but file by file, so that an error can name the file."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except (UnsafeFileError, UnreadableFileError) as error:
                raise type(error)(f"{self._directory / name}: {error}") from None
            except torch.OutOfMemoryError:
                raise
            except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
                _refuse_payload(self._directory / name, error)
        done: Future[None] = Future()
        done.set_result(None)
        return done


_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def _refuse_payload(file: Path, error: Exception) -> NoReturn:
    """Raise the error for a tensor that torch refused to read; with `weights_only` torch names the class."""
    named = _GLOBAL.search(str(error))
    if named is None:
        raise UnreadableFileError(f"{file}: cannot be read ({first_line(error)}); restore the file") from error
    raise UnsafeFileError(f"{file}: {forbidden([named[1]])}") from error


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = load_objects(value)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found


class _Load(LoadShardedStrategy):
    """A strategy that loads tensors like Megatron's own, with the reader and the planner of this module."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """No-op: `check_backend` has checked it."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """No-op: there is only one version."""

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError("saved_shapes has them")

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> Any:
        tensors = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state_dict: dict[str, Any] = mcore_to_pyt_state_dict(by_key, True)
        load_state_dict(
            state_dict,
            _Reader(Path(checkpoint_dir)),
            planner=_Planner(
                shapes_validation_sharded_tensors=[part for part in tensors if not part.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={part.key: part for part in tensors if part.allow_shape_mismatch},
            ),
        )
        unwrapped: dict[str, Any] = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state_dict.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _NoCommon(LoadCommonStrategy):
    """A strategy without a common part, because `read_common` has read it."""

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """No-op: `check_backend` has checked it."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """No-op: there is only one version."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError("objects are in *.distcp")


def check_backend(directory: Path) -> None:
    """Raise UnreadableFileError if `metadata.json` names a format other than torch_dist."""
    file = directory / CONFIG_FNAME
    try:
        config = json.loads(file.read_bytes())
        found = config["sharded_backend"], config.get("common_backend", "torch")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableFileError(f"{file}: cannot be read ({first_line(error)}); restore the file") from error
    if found != (FORMAT, "torch"):
        raise UnreadableFileError(f"{file}: the format is {found[0]!r} with {found[1]!r}; convert it to {FORMAT} first")


def read_common(directory: Path) -> dict[str, Any]:
    """Read the part of a checkpoint that is not sharded tensors: settings, schedule, optimizer step.

    Raises:
        UnsafeFileError: it holds a class that is not listed.
        UnreadableFileError: it cannot be read, or has another format.
    """
    check_backend(directory)
    try:
        with (directory / COMMON).open("rb") as file:
            common = load_objects(file)
    except (UnsafeFileError, UnreadableFileError) as error:
        raise type(error)(f"{directory / COMMON}: {error}") from None
    if not isinstance(common, dict):
        raise UnreadableFileError(f"{directory / COMMON}: holds {type(common).__name__}, not a dictionary")
    return common


def load_sharded(directory: Path, wanted: dict[str, Any], *, shared: bool) -> dict[str, Any]:
    """Return `wanted` with its tensors and objects filled in. Collective.

    With `shared`, for tensors: of what several data-parallel ranks want, one reads each, and sends it to the others.
    """
    strategy: LoadShardedStrategy = _Load()
    if shared:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        assert isinstance(group, ProcessGroup)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    loaded = dist_checkpointing.load(wanted, str(directory), sharded_strategy=strategy, common_strategy=_NoCommon())
    assert isinstance(loaded, dict)
    return loaded


def saved_shapes(directory: Path) -> dict[str, tuple[int, ...] | None]:
    """Return each tensor's whole shape by key; None for an object, whose key comes without its shard's number."""
    described = read_metadata(directory).state_dict_metadata
    return {
        key.partition("/shard_")[0]: tuple(size) if (size := getattr(value, "size", None)) is not None else None
        for key, value in described.items()
    }
