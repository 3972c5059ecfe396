"""Hugging Face directories: safetensors that are read one tensor at a time and written shard by shard.

- Used by: `megatron.model.hf_weights` and the tools.
- Invariant: a directory written by `write_hf` is complete, because it is written under a temporary name and then
  renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def is_hf_directory(path: str | Path) -> bool:
    """Return whether `path` has an HF model with safetensors weights."""
    root = Path(path)
    return (root / "config.json").is_file() and ((root / SINGLE).is_file() or (root / INDEX).is_file())


def _inside(file: str) -> str:
    """Return a file name from an index, after checking that it is in the same directory.

    Raises:
        ValueError: the name leads elsewhere.
    """
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise ValueError(f"{file!r} is not a safetensors file in this directory")
    return file


class HFReader:
    """Reads the tensors of an HF directory by name, when they are requested."""

    def __init__(self, path: str | Path) -> None:
        """Read headers only.

        Raises:
            ValueError: there are no safetensors, a listed file is missing, or a file is damaged; the message names the
                file.
        """
        self.path = Path(path)
        self._files: dict[Path, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        index = self.path / INDEX
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
                files = {name: _inside(file) for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{index} is not a safetensors index ({error!r}); download it again") from error
            return {name: self.path / file for name, file in files.items()}
        single = self.path / SINGLE
        if not single.is_file():
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}; name a Hugging Face directory with one")
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            if not file.is_file():
                raise ValueError(f"{file} is listed in {INDEX} but missing; download it again")
            try:
                self._files[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or cut short ({error}); download it again") from error
        return self._files[file]

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._open(self._file_of[name])

    def names(self) -> list[str]:
        return list(self._file_of)

    def get(self, name: str) -> Tensor:
        """Return one whole tensor, on the CPU, in its storage dtype."""
        file = self._file(name)
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._file_of[name]} has no usable tensor {name} ({error})") from error

    def dtype(self, name: str) -> torch.dtype:
        """Return the storage dtype of one tensor, from the header."""
        file = self._file(name)
        try:
            kind = file.get_slice(name).get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{self._file_of[name]} has no usable tensor {name} ({error})") from error
        if kind not in DTYPES:
            raise ValueError(f"{self._file_of[name]}: {name} is stored as {kind}; convert it to bf16 or fp32 first")
        return DTYPES[kind]

    def dtypes(self) -> set[torch.dtype]:
        """Return all storage dtypes in the directory."""
        return {self.dtype(name) for name in self.names()}


class _ShardWriter:
    """Collects tensors, and writes a file whenever the next one would exceed `max_bytes`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[tuple[Path, list[str]]] = []
        self.pending_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
            self.flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def flush(self) -> None:
        file = self.directory / f"shard-{len(self.shards)}.safetensors"
        save_file(self.pending, file, metadata={"format": "pt"})
        self.shards.append((file, list(self.pending)))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the shards their final names, which contain the number of shards and so are known only at the end."""
        if self.pending:
            self.flush()
        if not self.shards:
            raise ValueError("no tensors to write")
        if len(self.shards) == 1:
            self.shards[0][0].rename(self.directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self.shards, start=1):
            target = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            file.rename(self.directory / target)
            weight_map |= dict.fromkeys(names, target)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2))


def _copy_side_files(source: Path, target: Path) -> None:
    """Copy config, generation config, tokenizer, chat template, model code: every plain file that is not weights."""
    for file in sorted(source.iterdir()):
        is_weights = file.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        if file.is_file() and not is_weights and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _put_in_place(written: Path, path: Path) -> None:
    if path.exists():
        if any(path.iterdir()) and not (path / "config.json").is_file():
            raise ValueError(f"{path} exists and is not a Hugging Face directory; name another place to export to")
        old = path.with_name(f".tmp_old_{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        written.rename(path)
        shutil.rmtree(old)
    else:
        written.rename(path)


def write_hf(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    source_hf_dir: str | Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = 5 * 1024**3,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an HF directory of `tensors`; all other files come from `source_hf_dir` (`config.json` only if not given).

    With `dtype` None, each tensor gets its dtype in the source. An earlier export at `path` is replaced. Memory: one
    shard.

    Raises:
        ValueError: `path` is the source, or a directory of something else.
    """
    path, source = Path(path), Path(source_hf_dir)
    if path.resolve() == source.resolve():
        raise ValueError(f"{path} is the source of the export; name another place")
    reader = HFReader(source) if dtype is None else None
    written = path.with_name(f".tmp_{path.name}")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        _copy_side_files(source, written)
        writer = _ShardWriter(written, max_shard_bytes)
        for name, tensor in tensors:
            target_dtype = reader.dtype(name) if reader is not None else dtype
            # A copy: safetensors refuses views of shared storage, and the caller may reuse its buffer.
            writer.add(name, tensor.detach().to("cpu", target_dtype, copy=True).contiguous())
        writer.finish()
        if config is not None:
            (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if dtype is not None:
            _set_config_dtype(written / "config.json", dtype)
        _put_in_place(written, path)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _set_config_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = json.loads(config_file.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
